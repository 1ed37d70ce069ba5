"""The page of a run: what it shows, and how it is drawn. Nothing is computed here."""
