"""Analysis of trained adapters.

It measures the similarity of the experts, their spectra, and how far a factor moved.

    from malora.analysis import means, similarities

    means(similarities(model))                    # experts of one model
    means(similarities(model, model_of_seed_2))   # the same experts of two models

The first is MT of the paper's Figure 2. The second is ST(S) if the models differ in their seed, and ST(D) if they
differ in their task.

A model has experts of this package, or LoRA modules of PEFT, each of which counts as one expert. Every function that
takes a model also takes what `extract_experts` returned earlier, for example before training, or what `load_experts`
read from a folder. All computations are in float64 on the CPU.

`movement` needs SciPy: `pip install 'malora[analysis]'`.
"""

from malora.analysis.experts import Experts, extract_experts, load_experts
from malora.analysis.factor_movement import Movement, movement
from malora.analysis.similarity import Similarity, canonical_correlations, chance_level, means, similarities
from malora.analysis.spectrum import Spectrum, spectra

__all__ = [
    "Experts",
    "Movement",
    "Similarity",
    "Spectrum",
    "canonical_correlations",
    "chance_level",
    "extract_experts",
    "load_experts",
    "means",
    "movement",
    "similarities",
    "spectra",
]
