"""Find the images and masks of a BIDS dataset by name, and read its tables of phenotypes.

pybids is used here. Opening an image is left to `nidl_dcl.volumes`.
"""
