"""Tables in, scores out: cross-validated prediction, baselines, confounds, sites, occlusion.

scikit-learn's conventions hold here. Never sees a model or an image file; where tables come from and
where scores are written is left to `nidl_dcl.workflow`.
"""
