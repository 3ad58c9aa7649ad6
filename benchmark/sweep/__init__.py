"""A config file (schema.py, load.py), the cells that it spans (cell.py), and a config that measures one cell again (reproduce.py)."""
