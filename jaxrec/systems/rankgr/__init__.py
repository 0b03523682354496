"""RankGR: a decoder that learns the order of a session's items, and a rank head inside the beam."""
