"""Everything that touches Lightning: what the hooks of the callback call, one stage in each file."""
