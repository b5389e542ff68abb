"""One image in, one prepared array out: reading, checking, preparing, caching.

nibabel is used here. Which images there are is left to `nidl_dcl.bids`, what is drawn from a prepared
volume to `nidl_dcl.data`.
"""
