"""Rated rows as they stand in an archive: made once, added to by re-ratings, closed by month."""
