"""One image in, one prepared array out: reading, checking, preparing, caching.

nibabel is used here. Finding images is left to `nidl_dcl.bids`, drawing views of a prepared volume to
`nidl_dcl.data`.
"""
