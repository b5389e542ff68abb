"""The stages of a study: options in, output folder out.

Each stage calls what the folders below compute, and writes its results. Parsing the command line is
left to `nidl_dcl.cli`.
"""
