"""From numbers to pages: tables, figures, the radar plot, and the quality of a dataset."""
