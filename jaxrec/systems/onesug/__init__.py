"""OneSug: query suggestion that writes queries for what is typed."""
