"""Programs over the library, run as `python -m experiments.NAME`."""

import sys

if sys.argv[0] == "-m":  # a program, while Python looks for it; not a test or a notebook that imports one
    from experiments.pages import keep_pages

    keep_pages()
