"""Reading and writing: items in files of any size, and the vectors of a semantic_ids folder."""
