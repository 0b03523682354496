"""jaxrec: generative retrieval for commerce in JAX and Flax.

One trained model reads what a shopper did and generates the semantic IDs of items, or texts, by beam search.

Dimension letters, used in einsums, names and docstrings; never another letter:

    B  batch                      W  beam width             E  experts
    S  context length             D  model width            C  candidates
    L  targets per context        N  attention heads        V  vocabulary
    M  tokens per target          H  head width             K  codebook size
    U  users (evaluation only)    F  feed-forward width     Q  learned queries
                                                            I  items

Packages import only from those before them:
config, console, files, run, page, programs, nn, losses, training, data, text, semantic_ids, models, decoding, targets,
catalogue, evaluation, systems, serving, export.
"""

__version__ = "0.1.0"
