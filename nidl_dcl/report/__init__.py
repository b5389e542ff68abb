"""Files in, one HTML page out. Computes nothing: numbers come from the files of an output folder."""
