"""The estimator `DCL`: losses, encoders, training, checkpoints and model folders.

Lightning is used here. Scores of what a model learnt are left to `nidl_dcl.evaluation`.
"""
