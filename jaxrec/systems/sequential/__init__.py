"""The item-level baselines: SASRec, BERT4Rec, HSTU and others."""
