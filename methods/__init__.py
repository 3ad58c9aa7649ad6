"""The methods: one file each. What several share is in `methods.parts`."""
