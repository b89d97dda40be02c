"""Which inputs, weights and training examples an output is due to, and whether such answers can be believed.

The signature of the room: ``(model, inputs, ...) -> attributions`` of the inputs' shape, or ``-> Report``.
"""

from weightsmith.card import table
from weightsmith.inspect.attribution._attention import attention_attribution, f_clipscore
from weightsmith.inspect.attribution._data_from_weights import Selected, matching_pursuit, training_data
from weightsmith.inspect.attribution._deeplift import deeplift, unit_importance
from weightsmith.inspect.attribution._integrated_gradients import integrated_gradients
from weightsmith.inspect.attribution._leakage import masked_predictor, masked_score, shap_kl
from weightsmith.inspect.attribution._parts import Attribution
from weightsmith.inspect.attribution._path import path_attribution
from weightsmith.inspect.attribution._relative import (
    input_dependence_rate,
    input_independence_rate,
    insignificant_patch,
    model_contrast_score,
    pasted,
    relative_importance,
    shown,
)
from weightsmith.inspect.attribution._retraining import (
    block_pictures,
    diffroar,
    input_gradients,
    keep_ranked,
    remove_and_retrain,
)
from weightsmith.inspect.attribution._shapley import Shapley, shapley, swapped
from weightsmith.inspect.attribution._training_data import dtrak, gradient_cosines, kernel_scores, lds, trak

__all__ = [
    "Attribution",
    "Selected",
    "Shapley",
    "attention_attribution",
    "block_pictures",
    "deeplift",
    "diffroar",
    "dtrak",
    "f_clipscore",
    "gradient_cosines",
    "input_dependence_rate",
    "input_gradients",
    "input_independence_rate",
    "insignificant_patch",
    "integrated_gradients",
    "keep_ranked",
    "kernel_scores",
    "lds",
    "masked_predictor",
    "masked_score",
    "matching_pursuit",
    "model_contrast_score",
    "pasted",
    "path_attribution",
    "relative_importance",
    "remove_and_retrain",
    "shap_kl",
    "shapley",
    "shown",
    "swapped",
    "training_data",
    "trak",
    "unit_importance",
]

METHODS = table(
    attention_attribution,
    block_pictures,
    deeplift,
    diffroar,
    dtrak,
    f_clipscore,
    gradient_cosines,
    input_dependence_rate,
    input_gradients,
    input_independence_rate,
    insignificant_patch,
    integrated_gradients,
    keep_ranked,
    kernel_scores,
    lds,
    masked_predictor,
    masked_score,
    matching_pursuit,
    model_contrast_score,
    pasted,
    path_attribution,
    relative_importance,
    remove_and_retrain,
    shap_kl,
    shapley,
    shown,
    swapped,
    training_data,
    trak,
    unit_importance,
)
