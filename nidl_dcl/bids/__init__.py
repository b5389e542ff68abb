"""What lies in a BIDS dataset, and what its tables say: images, masks, phenotypes.

Finds files by name and reads tables; pybids is used here. Opening an image is left to
`nidl_dcl.volumes`.
"""
