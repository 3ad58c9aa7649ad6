"""The methods: one file each. What several share is in `dfqbench_methods.parts`."""
