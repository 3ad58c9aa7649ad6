"""What `dfqbench run` does with a sweep: claim cells (runner.py), train and evaluate (worker.py), show (progress.py); also select and pretrain."""
