"""What brings data in: making phantoms, converting OASIS, checking a data set. None of it needs torch."""
