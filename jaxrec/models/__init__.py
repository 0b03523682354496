"""Models: modules with the three verbs `prefill`, `score` and `extend` (one context, many targets)."""
