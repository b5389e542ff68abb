"""From a raw T1-weighted head to a masked brain in the space of a template.

Reading, bias correction, brain extraction, affine registration, resampling, and measures with a
verdict on each image. SimpleITK and the network of deepbet are used here, loaded when first needed:
they come with ``nidl_dcl[preprocess]``. Which images there are is left to `nidl_dcl.bids`, where
results are written to `nidl_dcl.workflow`.
"""
