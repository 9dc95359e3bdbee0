"""Training step of an image model against a plain Python loop over its components.

The loop is what one writes first: an encoder of its own for every component, the density of
every draw under every component one by one, the decoder once per component, gates as two layers,
masked convolutions as whole kernels times a mask. It has the same weights and the same noise, and
its loss is checked to be the same. Both take one step: loss, gradients, Adam. In the loop, Adam is
torch's default unless ``--fused-loop`` is given; in the other it is the fused one that
`mixscvi.images` trains with. The C library keeps freed memory for both, as in the command line.

With a shifted encoder, the loop runs the shared network once per component, with its code.

A VampPrior makes two loops: one that encodes the pseudo-inputs once per step, and one that does so
whenever it evaluates log p(z), so once per component. Both are in the CSV, under `loop`.

Images are real, because the cost of a step depends on how many pixels are on. Run
``python benchmarks/images_step_time.py``; it writes ``results/images_step_time.csv`` beside itself.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from common import RESULTS, data_folder, machine
from torch import Tensor, nn

from mixscvi.images.datasets import binarize, load
from mixscvi.images.experiments.configs import BUDGETS, BudgetName
from mixscvi.images.networks.configs import PRESETS, MixtureConfig
from mixscvi.images.networks.encoders import clamped_variance
from mixscvi.images.networks.vae import ImageVAE
from mixscvi.mixture import StackedLinear, miselbo
from mixscvi.system import keep_freed_memory, write_beside
from mixscvi.tables import csv_text


class _Gated(nn.Module):
    """Two layers, one gating the other."""

    def __init__(self, layer: Callable[[Tensor, Tensor | None], nn.Module], weight, bias) -> None:
        super().__init__()
        weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        self.h, self.g = (layer(w, b) for w, b in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(x) * self.g(x).sigmoid()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def _conv(stride: int) -> Callable[[Tensor, Tensor], nn.Conv2d]:
    def make(weight: Tensor, bias: Tensor) -> nn.Conv2d:
        n_out, n_in, size, _ = weight.shape
        layer = nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        return layer

    return make


class _MaskedConv(nn.Conv2d):
    """A whole kernel times a mask."""

    def __init__(self, layer: nn.Module) -> None:
        n_out, n_in, height, size = layer.weight.shape
        super().__init__(n_in, n_out, size, padding=size // 2)
        mask = torch.zeros(size, size)
        mask[:height] = layer.mask
        self.register_buffer("mask", mask)
        self.weight.data.zero_()[:, :, :height].copy_(layer.weight)
        self.bias.data.copy_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def _gated_mlp(layers: nn.Sequential) -> nn.Sequential:
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    hidden = [_Gated(_linear, layer.weight, layer.bias) for layer in linears[:-1]]
    return nn.Sequential(*hidden, _linear(linears[-1].weight, linears[-1].bias))


def _trunk(stacked: nn.Module, a: int) -> nn.Sequential:
    layers = []
    for layer in stacked.layers:
        if isinstance(layer, StackedLinear):
            layers.append(_Gated(_linear, layer.weight[a], layer.bias[a]))
        else:
            layers.append(_Gated(_conv(layer.stride), layer.weight[a], layer.bias[a]))
    convolutional = not isinstance(stacked.layers[0], StackedLinear)
    return (
        nn.Sequential(*layers, nn.Flatten())
        if convolutional
        else nn.Sequential(nn.Flatten(), *layers)
    )


class _Heads(nn.Module):
    def __init__(self, stacked: nn.Module, a: int) -> None:
        super().__init__()
        self.mean = _linear(stacked.mean.weight[a], stacked.mean.bias[a])
        self.var = _linear(stacked.var.weight[a], stacked.var.bias[a])

    def forward(self, h: Tensor) -> torch.distributions.Distribution:
        scale = clamped_variance(self.var(h)).sqrt()
        normal = torch.distributions.Normal(self.mean(h), scale, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)


class _Encoder(nn.Module):
    def __init__(self, stacked: nn.Module, a: int) -> None:
        super().__init__()
        self.trunk, self.heads = _trunk(stacked.trunk, a), _Heads(stacked.heads, a)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        return self.heads(self.trunk(x))


class _ShiftedEncoder(nn.Module):
    """A component of a shared encoder: its code is added before the last gate."""

    def __init__(self, shared: _Encoder, code: Tensor) -> None:
        super().__init__()
        self.shared = shared
        self.codes = nn.ParameterList(part.detach().clone() for part in code.chunk(2))

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        h, last = self.shared.trunk[:-1](x), self.shared.trunk[-1]
        h = (last.h(h) + self.codes[0]) * (last.g(h) + self.codes[1]).sigmoid()
        return self.shared.heads(h)


class _LowerEncoder(nn.Module):
    """q_a(z1 | x, z2)."""

    def __init__(self, stacked: nn.Module, a: int) -> None:
        super().__init__()
        self.trunk, self.heads = _trunk(stacked.trunk, a), _Heads(stacked.heads, a)
        self.latent = _Gated(_linear, stacked.latent_trunk.weight[a], stacked.latent_trunk.bias[a])
        joint = torch.cat((stacked.from_image.weight[a], stacked.from_latent.weight[a]), 1)
        self.joint = _Gated(_linear, joint, stacked.from_image.bias[a])

    def forward(self, image: Tensor, z2: Tensor) -> torch.distributions.Distribution:
        return self.heads(self.joint(torch.cat((image, self.latent(z2)), -1)))


class _PixelCNN(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.shape = decoder.image_shape
        self.first = _MaskedConv(decoder.first)
        self.image_layers = nn.ModuleList(_MaskedConv(layer) for layer in decoder.image_layers)
        self.joint_layers = nn.ModuleList(_MaskedConv(layer) for layer in decoder.joint_layers)
        self.maps = _gated_mlp(decoder.latent_maps)
        weight, bias = decoder.latent_mix.weight, decoder.latent_mix.bias
        self.mix = _conv(1)(weight[..., None, None], bias)
        self.last = _conv(1)(decoder.last.weight[..., None, None], decoder.last.bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.image_layers:
            h = h + layer(F.relu(h))
        maps = self.maps(z).unflatten(-1, (*self.shape, -1)).permute(0, 3, 1, 2)
        h = h + self.mix(maps)
        for layer in self.joint_layers:
            h = h + layer(F.relu(h))
        return self.last(F.relu(h)).flatten(1)


class _Bernoulli(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.logits = _gated_mlp(decoder.logits)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.logits(z)


class _Loop(nn.Module):
    """The model as a loop over its components."""

    def __init__(self, model: ImageVAE, *, prior_once: bool) -> None:
        super().__init__()
        self.prior_once = prior_once
        components = range(model.mixture.n_components)
        if not model.encoder.heads.share_trunk:
            encoders = [_Encoder(model.encoder, a) for a in components]
        else:
            shared = _Encoder(model.encoder, 0)
            encoders = [_ShiftedEncoder(shared, code) for code in model.encoder.heads.codes]
        self.encoders = nn.ModuleList(encoders)
        self.lower_encoders = None
        if model.lower_encoder is not None:
            self.lower_encoders = nn.ModuleList(
                _LowerEncoder(model.lower_encoder, a) for a in components
            )
        self.flows, self.lower_prior = model.flows, model.lower_prior
        self.pseudo = model.prior.pseudo_inputs if model.config.prior == "vamp" else None
        pixelcnn = model.config.decoder == "pixelcnn"
        self.decoder = _PixelCNN(model.decoder) if pixelcnn else _Bernoulli(model.decoder)

    def pseudo_posteriors(self) -> list:
        return [] if self.pseudo is None else [q(self.pseudo()) for q in self.encoders]

    def log_prior(self, z: Tensor, pseudo: list) -> Tensor:
        if self.pseudo is None:
            return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        terms = [q.log_prob(z.unsqueeze(-2)) for q in pseudo]
        terms = torch.cat(terms, -1)
        return terms.logsumexp(-1) - torch.log(torch.tensor(float(terms.shape[-1])))

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n = len(self.encoders)
        pseudo = self.pseudo_posteriors() if self.prior_once else None
        posteriors = [encoder(x) for encoder in self.encoders]
        noise = torch.randn(len(x), n, posteriors[0].mean.shape[-1], generator=generator)
        lower_noise = None
        if self.lower_encoders is not None:
            lower_noise = torch.randn(noise.shape, generator=generator)
            images = [encoder.trunk(x) for encoder in self.lower_encoders]
        log_weights = []
        for a in range(n):
            base = posteriors[a].base_dist
            z0 = base.loc + base.scale * noise[:, a]
            log_q = [posteriors[j].log_prob(z0) for j in range(n)]
            z, log_det = self.flows[0](z0) if self.flows else (z0, 0.0)
            log_p = self.log_prior(z, self.pseudo_posteriors() if pseudo is None else pseudo)
            log_q = [value - log_det for value in log_q]
            if self.lower_encoders is not None:
                posterior = self.lower_encoders[a](images[a], z)
                own = posterior.base_dist
                z0 = own.loc + own.scale * lower_noise[:, a]
                lower, log_det = self.flows[1](z0) if self.flows else (z0, 0.0)
                for j in range(n):
                    conditional = posterior if j == a else self.lower_encoders[j](images[j], z)
                    log_q[j] = log_q[j] + conditional.log_prob(z0) - log_det
                log_p = log_p + self.lower_prior(z).log_prob(lower)
                z = torch.cat((z, lower), -1)
            logits = self.decoder(x, z)
            log_p = log_p - F.binary_cross_entropy_with_logits(
                logits, x.flatten(1), reduction="none"
            ).sum(-1)
            mixture = torch.stack(log_q).logsumexp(0) - torch.log(torch.tensor(float(n)))
            log_weights.append(log_p - mixture)
        return -torch.stack(log_weights).mean()


Model = Literal["vanilla", "vanilla shifted", "pixelcnn", "composite"]


@dataclass
class Arguments:
    """Time both and write the ratios."""

    models: tuple[Model, ...] = ("vanilla", "vanilla shifted", "pixelcnn", "composite")
    """Presets, with separate encoders unless shifted is said."""
    budgets: tuple[BudgetName, ...] = ("paper", "small")
    """Sizes of the networks."""
    datasets: tuple[str, ...] = ("mnist",)
    """Where the minibatch comes from."""
    threads: tuple[int, ...] = (1, 2)
    components: int = 4
    batch_size: int = 100
    seconds: float = 20.0
    """Steps are repeated for so long, and five times at least."""
    fused_loop: bool = False
    """Give the loop the fused Adam too."""
    output: Path = RESULTS / "images_step_time.csv"


def _stepper(module: nn.Module, loss: Callable[[], Tensor], *, fused: bool) -> Callable[[], float]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-5, fused=fused)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def _repeated(steps: list[Callable[[], float]], seconds: float) -> list[list[float]]:
    """Times of each, taken in turn, so that what else the machine does falls on all of them."""
    for step in steps * 2:  # until the memory that is kept suffices for all
        step()
    rows: list[list[float]] = []
    while len(rows) < 5 or sum(map(sum, rows)) < seconds:
        rows.append([step() for step in steps])
    return [list(column) for column in zip(*rows, strict=True)]


def _compare(
    model: ImageVAE, x: Tensor, loops: dict[str, _Loop], seconds: float, *, fused_loop: bool
) -> tuple[list[float], dict[str, list[float]]]:
    """Times of the model's step, and of each loop's."""

    def ours() -> Tensor:
        draws = model.draw(x, generator=torch.Generator().manual_seed(0))
        return -miselbo(model.log_weights(x, draws)).mean()

    steps = [_stepper(model, ours, fused=True)]
    for loop in loops.values():

        def theirs(loop: _Loop = loop) -> Tensor:
            return loop(x, torch.Generator().manual_seed(0))

        with torch.no_grad():
            torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-2)
        steps.append(_stepper(loop, theirs, fused=fused_loop))
    mixture, *others = _repeated(steps, seconds)
    return mixture, dict(zip(loops, others, strict=True))


def main() -> None:
    """Measure."""
    arguments = tyro.cli(Arguments)
    keep_freed_memory()
    rows = []
    folder, n_images = data_folder() / "images", arguments.batch_size
    minibatches = {name: load(name, folder).train[:n_images] for name in arguments.datasets}
    for (dataset, images), budget, name, threads in itertools.product(
        minibatches.items(), arguments.budgets, arguments.models, arguments.threads
    ):
        torch.set_num_threads(threads)
        preset, _, component_encoder = name.partition(" ")
        mixture = MixtureConfig(
            arguments.components, component_encoder=component_encoder or "separate"
        )
        torch.manual_seed(0)
        x = binarize(images)
        model = ImageVAE((28, 28), PRESETS[preset], mixture, BUDGETS[budget].sizes)
        loops = {"prior once per step": _Loop(model, prior_once=True)}
        if model.config.prior == "vamp":
            loops["prior once per component"] = _Loop(model, prior_once=False)
        mixture_s, loops_s = _compare(
            model, x, loops, arguments.seconds, fused_loop=arguments.fused_loop
        )
        for kind, loop_s in loops_s.items():
            row = {
                "dataset": dataset,
                "preset": preset,
                "component_encoder": mixture.component_encoder,
                "budget": budget,
                "components": arguments.components,
                "batch_size": arguments.batch_size,
                "threads": threads,
                "loop": kind,
                "loop_adam": "fused" if arguments.fused_loop else "default",
                "loop_ms": round(1e3 * statistics.median(loop_s), 1),
                "mixture_ms": round(1e3 * statistics.median(mixture_s), 1),
                "ratio": round(statistics.median(mixture_s) / statistics.median(loop_s), 3),
                "ratio_of_fastest": round(min(mixture_s) / min(loop_s), 3),
                "repeats": len(mixture_s),
                "seed": 0,
            }
            print(*row.values(), flush=True)
            rows.append(row | machine())
    write_beside(arguments.output, csv_text(rows))


if __name__ == "__main__":
    main()
