"""The estimator `DCL`: losses, encoders, training, checkpoints and model folders.

Lightning is used here. Scores of embeddings are left to `nidl_dcl.evaluation`.
"""
