"""The output folder: a BIDS derivative with one writer, a record of its runs, and shared copies.

What is computed, and when, is left to `nidl_dcl.workflow`.
"""
