"""What a pass over data says about weights.

The signature of the room: ``(model, batches) -> Weights``, a statistic under the name of each weight
that it speaks of. `collect` gathers several in one pass; `combine` adds up what was gathered on
shards of the data. The model is left as it was.
"""

from weightsmith.stats._activations import Activations, activations
from weightsmith.stats._batch_norm import batch_norm
from weightsmith.stats._curvature import Curvature, curvature, hessian_gradient
from weightsmith.stats._distributed import reduced
from weightsmith.stats._example_gradients import example_gradients, fitted, project
from weightsmith.stats._experts import ExpertGram, expert_gram
from weightsmith.stats._fisher import Fisher, Labels, fisher
from weightsmith.stats._gradients import Gradients, gradients
from weightsmith.stats._gram import Gram, features, gram
from weightsmith.stats._matrices import matrices
from weightsmith.stats._output_gradients import GuidedGram, OutputGradients, guided_gram, output_gradients
from weightsmith.stats._record import Recorder
from weightsmith.stats._walk import Block, walk
from weightsmith.stats._walk_modules import hollow
from weightsmith.stats.room import Access, Batch, Counter, Forward, Loss, Statistic, collect, combine

__all__ = [
    "Access",
    "Activations",
    "Batch",
    "Block",
    "Counter",
    "Curvature",
    "ExpertGram",
    "Fisher",
    "Forward",
    "Gradients",
    "Gram",
    "GuidedGram",
    "Labels",
    "Loss",
    "OutputGradients",
    "Recorder",
    "Statistic",
    "activations",
    "batch_norm",
    "collect",
    "combine",
    "curvature",
    "example_gradients",
    "expert_gram",
    "features",
    "fisher",
    "fitted",
    "gradients",
    "gram",
    "guided_gram",
    "hessian_gradient",
    "hollow",
    "matrices",
    "output_gradients",
    "project",
    "reduced",
    "walk",
]
