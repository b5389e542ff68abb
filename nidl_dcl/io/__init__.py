"""Files, whatever is in them: written whole or not at all, formatted, hashed and remembered.

Also what a run says on the terminal. What a file means is left to the folders above.
"""
