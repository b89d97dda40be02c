"""Whether attributions can be believed, judged where it is known what matters more.

Pictures of things pasted onto scenes, one network trained to name the thing and one to name the scene: the thing must
matter more to the first; to the second less than the scene that it covers; and a patch that changes no answer should
change no explanation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.inspect._report import Line, Plot, Report
from weightsmith.inspect.attribution._parts import frozen, interval_of_mean
from weightsmith.weights import working

Attribute = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, inputs [n, c, h, w], labels [n]) -> scores`` of the inputs' shape or ``[n, 1, h, w]``."""


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    unit="row",
    claim="about 0 for random scores, above 0 for those that follow what the models were trained for",
)
def model_contrast_score(things: Tensor, scenes: Tensor, mask: Tensor) -> Tensor:
    r"""How much more a region matters to one model than to another.

    .. math:: \mathrm{MCS}_i = \frac{1}{|M_i|} \sum_{p \in M_i}
        \bigl(A^{\text{thing}}_{ip} - A^{\text{scene}}_{ip}\bigr)

    Args:
        things: ``[n, 1, h, w]`` scores under the model for which the region matters, best brought to [0, 1] by
            `shown`.
        scenes: the same under the other model.
        mask: ``[n, 1, h, w]`` bool, the region.

    Returns:
        ``[n]``; the mean is the score of the method.

    Raises:
        ValueError: shapes that do not fit, an empty mask.

    >>> mask = torch.tensor([[[[True, False]]]])
    >>> model_contrast_score(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.25, 1.0]]]]), mask)
    tensor([0.7500])
    """
    return _inside(things, mask) - _inside(scenes, mask)


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    unit="row",
    claim="about a half for scores that do not look at the model",
)
def input_dependence_rate(without: Tensor, pasted: Tensor, mask: Tensor) -> float:
    """The share of pictures in which a thing that does not matter is given less than the pixels it covers.

    Args:
        without: ``[n, 1, h, w]`` scores of the scenes alone.
        pasted: scores of the scenes with the things.
        mask: ``[n, 1, h, w]`` bool, where the things are.

    Returns:
        float in [0, 1]: 1 less it is the rate of false positives.

    Raises:
        ValueError: shapes that do not fit, an empty mask.

    >>> mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    >>> low, high = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1)
    >>> input_dependence_rate(high, low, mask)
    0.5
    """
    return float((_inside(without, mask) > _inside(pasted, mask)).double().mean())


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    unit="row",
    claim="1 for scores that are the same where the answers are",
)
def input_independence_rate(without: Tensor, patched: Tensor, mask: Tensor, tolerance: float = 0.1) -> float:
    """The share of pictures whose explanation hardly changes when a patch is added that changes no answer.

    Args:
        without: ``[n, 1, h, w]`` scores of the pictures.
        patched: scores of the pictures with the patch.
        mask: ``[n, 1, h, w]`` bool, where the patch is.
        tolerance: how much the mean score there may change at most, as a share of what it was.

    Returns:
        float in [0, 1].

    Raises:
        ValueError: shapes that do not fit, an empty mask.

    >>> mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    >>> before, after = torch.ones(2, 1, 1, 1), torch.tensor([1.05, 2.0]).reshape(2, 1, 1, 1)
    >>> input_independence_rate(before, after, mask)
    0.5
    """
    before, after = _inside(without, mask), _inside(patched, mask)
    return float(((after - before).abs() <= tolerance * before.abs()).double().mean())


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    needs=("data",),
    unit="model",
    claim="a patch that is still like the one it started from and changes the answers less",
    departs="Adam on the squared change of the outputs, with a penalty that holds the patch near its start; the "
    "authors' code takes the plain norm and gradient descent, and rewards a large patch",
)
def insignificant_patch(
    model: nn.Module,
    inputs: Tensor,
    patches: Tensor,
    mask: Tensor,
    *,
    steps: int = 100,
    rate: float = 0.05,
    nearness: float = 0.01,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    r"""Pictures with patches that hardly change the answers.

    .. math:: \min_{\delta}\; \lVert f(x \oplus \delta) - f(x) \rVert^2 + \eta\, \lVert \delta - \delta_0 \rVert^2

    Args:
        model: left as it was.
        inputs: ``[n, c, h, w]``.
        patches: ``[n, c, h, w]``, what stands in the masked places at first.
        mask: ``[n, 1, h, w]`` bool.
        steps: of Adam.
        rate: its learning rate, in units of the pixels.
        nearness: :math:`\eta`.
        limits: the smallest and the largest value of a pixel.

    Returns:
        ``[n, c, h, w]``: the inputs with the patches.

    Raises:
        ValueError: shapes that do not fit.

    >>> layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> inputs, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[[True, False], [False, False]]]])
    >>> found = insignificant_patch(layer, inputs, torch.ones(1, 1, 2, 2), mask)
    >>> bool((layer(found) - layer(inputs)).norm() < (layer(mask.float()) - layer(inputs)).norm())
    True
    """
    _check(inputs, mask)
    if patches.shape != inputs.shape:
        raise Error(f"patches {list(patches.shape)} do not fit inputs {list(inputs.shape)}")
    with frozen(model), torch.enable_grad():
        wanted = model(inputs).detach()
        moving = patches.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([moving], lr=rate)
        for _ in range(steps):
            change = (model(torch.where(mask, moving, inputs)) - wanted).square().flatten(1).sum(dim=1)
            away = ((moving - patches) * mask).square().flatten(1).sum(dim=1)
            optimizer.zero_grad()
            (change + nearness * away).sum().backward(inputs=[moving])
            optimizer.step()
            with torch.no_grad():
                moving.clamp_(*limits)
    return torch.where(mask, moving.detach(), inputs)


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    needs=("data",),
    unit="row",
    claim="pictures in which a thing and a scene are known to be independent",
)
def pasted(things: Tensor, scenes: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small pictures pasted onto large ones, at random places.

    Args:
        things: ``[n, c, h, w]``.
        scenes: ``[n, c, H, W]``, at least as large.
        seed: of the places.

    Returns:
        ``[n, c, H, W]`` pictures, and ``[n, 1, H, W]`` bool: where the things are.

    Raises:
        ValueError: things and scenes that do not fit.

    >>> pictures, mask = pasted(torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 5, 6))
    >>> pictures.sum().item(), bool((pictures.bool() == mask).all())
    (12.0, True)
    """
    fit = things.dim() == scenes.dim() == 4 and things.shape[:2] == scenes.shape[:2]
    if not fit or things.shape[2] > scenes.shape[2] or things.shape[3] > scenes.shape[3]:
        raise Error(f"things {list(things.shape)} do not fit onto scenes {list(scenes.shape)}")
    generator = torch.Generator().manual_seed(seed)
    pictures, mask = scenes.clone(), torch.zeros_like(scenes[:, :1], dtype=torch.bool)
    (high, wide), (rows, columns) = things.shape[2:], scenes.shape[2:]
    tops = torch.randint(rows - high + 1, (len(things), 1, 1), generator=generator) + torch.arange(high)[:, None]
    lefts = torch.randint(columns - wide + 1, (len(things), 1, 1), generator=generator) + torch.arange(wide)
    examples, tops, lefts = (one.to(scenes.device) for one in (torch.arange(len(things))[:, None, None], tops, lefts))
    pictures[examples, :, tops, lefts] = things.to(scenes).permute(0, 2, 3, 1)
    mask[examples, 0, tops, lefts] = True
    return pictures, mask


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'; scores are shown as in "
    "Smilkov et al. 2017, 'SmoothGrad'",
    covers=("benchmarking-attribution-methods-relative",),
    unit="row",
    claim="scores of different methods become comparable",
)
def shown(scores: Tensor, top: float = 0.99) -> Tensor:
    """Scores as a picture shows them: sizes, summed over channels, brought to [0, 1] in each picture.

    Args:
        scores: ``[n, c, h, w]``.
        top: the quantile from which on everything is 1.

    Returns:
        ``[n, 1, h, w]``, float32 or wider.

    >>> shown(torch.tensor([[[[-4.0, 2.0, 0.0]]]]), top=1.0)
    tensor([[[[1.0000, 0.5000, 0.0000]]]])
    """
    sizes = working(scores).abs().sum(dim=1, keepdim=True)
    flat = sizes.flatten(1)
    low, high = flat.min(dim=1).values, flat.quantile(top, dim=1)
    span = (high - low).clamp(min=torch.finfo(sizes.dtype).tiny)
    return ((sizes - low[:, None, None, None]) / span[:, None, None, None]).clamp(0, 1)


@card(
    paper="Yang, Kim 2019, 'Benchmarking Attribution Methods with Relative Feature Importance'",
    covers=("benchmarking-attribution-methods-relative",),
    needs=("data",),
    unit="model",
    claim="ranks attribution methods without looking at them",
)
def relative_importance(
    attribute: Attribute,
    thing_model: nn.Module,
    scene_model: nn.Module,
    things: tuple[Tensor, Tensor],
    scenes: tuple[Tensor, Tensor],
    *,
    tolerance: float = 0.1,
    seed: int = 0,
) -> Report:
    """Three scores of an attribution method on things pasted onto scenes.

    Args:
        attribute: the method: ``(model, inputs, labels) -> scores``; brought to [0, 1] by `shown`.
        thing_model: trained on pasted pictures to name the thing.
        scene_model: trained on the same pictures to name the scene.
        things: ``[n, c, h, w]`` and their labels.
        scenes: ``[n, c, H, W]`` and their labels.
        tolerance: of the input independence rate.
        seed: of the places, and of the bootstrap.

    Returns:
        Report: ``model contrast`` with its interval, ``input dependence``, ``input independence``. Only pictures that
        are named rightly count (``pictures``), for the last also with the patch; None if there is none.

    Raises:
        ValueError: shapes that do not fit, or no picture that both models name rightly.

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
    >>> zeros = torch.zeros(4, dtype=torch.long)
    >>> grad = lambda model, x, y: ws.inspect.attribution.input_gradients(model, x, target=0)
    >>> things, scenes = (torch.rand(4, 1, 2, 2), zeros), (torch.rand(4, 1, 4, 4), zeros)
    >>> relative_importance(grad, net, net, things, scenes)["pictures"]
    4
    """
    pictures, mask = pasted(things[0], scenes[0], seed=seed)
    right = _right(thing_model, pictures, things[1]) & _right(scene_model, pictures, scenes[1])
    right &= _right(scene_model, scenes[0], scenes[1])
    if not bool(right.any()):
        raise Error("relative_importance: no picture that all models name rightly")
    pictures, mask, alone = pictures[right], mask[right], scenes[0][right]
    named, placed = things[1][right], scenes[1][right]
    with_thing = shown(attribute(thing_model, pictures, named))
    with_scene = shown(attribute(scene_model, pictures, placed))
    without = shown(attribute(scene_model, alone, placed))
    contrast = model_contrast_score(with_thing, with_scene, mask)
    limits = float(pictures.min()), float(pictures.max())
    patched = insignificant_patch(scene_model, alone, pictures, mask, limits=limits)
    after = shown(attribute(scene_model, patched, placed))
    same = _right(scene_model, patched, placed)
    independence = input_independence_rate(without[same], after[same], mask[same], tolerance) if same.any() else None
    low, high = interval_of_mean(contrast, seed)
    figures = {
        "model contrast": float(contrast.double().mean()),
        "low": low,
        "high": high,
        "input dependence": input_dependence_rate(without, with_scene, mask),
        "input independence": independence,
        "pictures": int(right.sum()),
    }
    order = contrast.sort().values.tolist()
    plot = Plot("Model contrast", "pictures, in order", "score", [Line("contrast", list(range(len(order))), order)])
    return Report("Relative importance", figures, plots=[plot])


def _inside(scores: Tensor, mask: Tensor) -> Tensor:
    """The mean score of each picture's region, ``[n]``."""
    _check(scores, mask)
    scores = working(scores)
    weights = mask.expand_as(scores).flatten(1).to(scores.dtype)
    if not bool((weights.sum(dim=1) > 0).all()):
        raise Error("a mask is empty: there is no region to look at")
    return (scores.flatten(1) * weights).sum(dim=1) / weights.sum(dim=1)


def _check(inputs: Tensor, mask: Tensor) -> None:
    if inputs.dim() != 4 or mask.shape != (len(inputs), 1, *inputs.shape[2:]) or not len(inputs):
        raise Error(f"pictures are [n, c, h, w] and masks [n, 1, h, w]; got {list(inputs.shape)}, {list(mask.shape)}")


def _right(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with frozen(model), torch.no_grad():
        return model(inputs).argmax(dim=1) == labels
