"""The methods that benchmarks/sizes.py compares, a file each."""
