"""What a training shows of itself: scalars, the bits of every channel, and what is said."""
