"""OneMall: Query-Formers over long histories, a cross-attention decoder with sparse experts."""
