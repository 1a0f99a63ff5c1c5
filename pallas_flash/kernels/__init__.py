"""One package for each way to run a spec; `dispatch.py` is the table of them."""
