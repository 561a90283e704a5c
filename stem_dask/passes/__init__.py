"""The passes of a job over all patterns: analysis, writing, normalization; and what they share."""
