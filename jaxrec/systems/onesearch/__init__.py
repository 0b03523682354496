"""OneSearch: personalised product search that generates the IDs of items."""
