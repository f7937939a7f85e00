"""The whole method on one page: quantize with one range per sampling step, cache, correct with Eq. 10.

It needs only torch and diffusers, and takes a DDIM pipeline whose `UNet2DModel` ends in an `UpBlock2D`.
errata does the same to linear layers and attention too, and computes in real integers;
`tests/examples/test_minimal.py` shows that the two agree.

    python examples/minimal.py [PIPELINE] [--out minimal.png]

    x_t         x         sample before step i; step 0 is the noisiest
    ε(x_t, t)   eps       noise that the network predicts
    A_t, B_t    A, B      DDIM step: x_{t-1} = A_t x_t + B_t ε(x_t, t)
    s, z        s, z      scale and zero point: code q stands for s (q - z)
    F           feature   hidden state that enters the last resnet of the up path
    N           N         cache interval: every N-th step runs the whole network
    λ, K        lam, K    step size and number of iterations of the correction

Sources: "Iterative Error Correction", Eq. 9 and 10; CacheQuant (ranges per step); DeepCache (cache).
"""

import argparse
import copy
import itertools
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn

DIGITS = Path(__file__).resolve().parents[1] / "core" / "embedded" / "digits"  # a small trained model


# Phase 1, 8 bits: a number becomes one of 256 multiples of a scale. A wide range rounds small values away, a
# narrow one cuts off large values, so we search for the best. Factors and exponent are those of CacheQuant.
def fake_quantize(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    q = (x / s + z).round().clamp(0, 255)
    return (q - z) * s


def choose_range(x: Tensor) -> tuple[Tensor, Tensor]:
    factors = torch.linspace(1.0, 0.22, 40)[:, None]
    low, high = x.min().clamp(max=0) * factors, x.max().clamp(min=0) * factors  # padding is 0: keep it exact
    s = ((high - low) / 255).clamp(min=1e-8)
    z = (-low / s).round()
    some = x.flatten()[:: max(1, x.numel() // 4096)]  # enough for a mean, with the extremes
    values = torch.cat([some, torch.stack(x.aminmax())])
    best = (fake_quantize(values, s, z) - values).abs().pow(2.4).mean(dim=1).argmin()
    return s[best, 0], z[best, 0]


def quantize_weight(w: Tensor) -> Tensor:
    rows = w.flatten(1)  # symmetric, one scale for each output channel
    s = torch.linspace(0.05, 1.0, 20)[:, None, None] * rows.abs().amax(dim=1)[:, None] / 127
    tried = (rows / s.clamp(min=1e-10)).round().clamp(-127, 127) * s
    best = (tried - rows).square().sum(dim=2).argmin(dim=0)
    return tried[best, torch.arange(len(w))].view_as(w)


# Phase 2, the network: it knows its step, because activations change so much from noise to image that one
# range cannot fit all steps. Deep features change slowly from step to step. So a cached step takes F from an
# earlier step, and computes only the first convolution, the last resnet and the output.
class Network:
    """A copy of a UNet that runs step i in full, or from the feature of an earlier step."""

    def __init__(self, unet: UNet2DModel, timesteps: list[int]) -> None:
        if (last := type(unet.up_blocks[-1]).__name__) != "UpBlock2D":
            raise ValueError(f"the last up block is {last}, not UpBlock2D; choose another pipeline")
        self.unet, self.timesteps, self.i = copy.deepcopy(unet).eval(), timesteps, 0
        self.ranges: dict[tuple[nn.Module, int], list[tuple[Tensor, Tensor]]] = {}  # see `quantize`
        self.last = self.unet.up_blocks[-1].resnets[-1]  # reads [F, skip]; skip is the output of conv_in
        self.last.register_forward_pre_hook(lambda _, inputs: setattr(self, "last_input", inputs[0]))

    def full(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Return ε(x, t) and F."""
        self.i = i
        eps = self.unet(x, self.timesteps[i]).sample
        return eps, self.last_input[:, : -self.unet.conv_in.out_channels]

    def cached(self, x: Tensor, i: int, feature: Tensor) -> Tensor:
        """Return ε(x, t), computed from an older F."""
        self.i, unet = i, self.unet
        emb = unet.time_embedding(unet.time_proj(torch.full((len(x),), self.timesteps[i])))
        h = self.last(torch.cat([feature, unet.conv_in(x)], dim=1), emb)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def quantize(network: Network, xs: list[Tensor]) -> Network:
    """Return a copy with 8-bit convolutions; ranges of step i fit the float activations at `xs[i]`."""
    network = Network(network.unet, network.timesteps)

    # Resnets of the up path read [hidden, skip]. The values of the two differ in size, so each part gets a
    # range and a weight scale of its own. `widths` has the channels of the parts that a convolution reads.
    widths = {conv: [conv.in_channels] for conv in network.unet.modules() if isinstance(conv, nn.Conv2d)}
    hidden = network.unet.config.block_out_channels[-1]
    for resnet in (resnet for block in network.unet.up_blocks for resnet in block.resnets):
        for conv in {resnet.conv1, resnet.conv_shortcut} - {None}:
            widths[conv] = [hidden, resnet.in_channels - hidden]
        hidden = resnet.out_channels

    def observe(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        network.ranges[conv, network.i] = [choose_range(x) for x in inputs[0].split(widths[conv], dim=1)]

    def quantize_input(conv: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        parts = zip(inputs[0].split(widths[conv], dim=1), network.ranges[conv, network.i], strict=True)
        return torch.cat([fake_quantize(x, s, z) for x, (s, z) in parts], dim=1)

    # First observe the float network at every step, then replace weights and quantize inputs.
    hooks = [conv.register_forward_pre_hook(observe) for conv in widths]
    for i, x in enumerate(xs):
        network.full(x, i)
    for hook, (conv, parts) in zip(hooks, widths.items(), strict=True):
        hook.remove()
        conv.register_forward_pre_hook(quantize_input)
        conv.weight.copy_(torch.cat([quantize_weight(w) for w in conv.weight.split(parts, dim=1)], dim=1))
    return network


# Phase 3, sampling: errors of quantization and reuse add up from step to step. The correction moves x_{t-1}
# to the point where the network, evaluated at x_{t-1} itself, agrees with the step.
def ddim(scheduler: DDIMScheduler, num_steps: int) -> tuple[list[int], list[tuple[float, float]]]:
    """Return the timestep, and A and B, of every step."""
    scheduler.set_timesteps(num_steps)
    now = scheduler.alphas_cumprod[scheduler.timesteps].double()
    after = torch.cat([now[1:], scheduler.final_alpha_cumprod[None]])
    A = (after / now).sqrt()
    B = (1 - after).sqrt() - (after * (1 - now) / now).sqrt()
    return scheduler.timesteps.tolist(), list(zip(A.tolist(), B.tolist(), strict=True))


def sample(network: Network, x: Tensor, steps: list[tuple[float, float]], N=1, K=0, lam=0.5) -> list[Tensor]:
    """Return x_T, …, x_0 from `x` = x_T, (B, C, H, W); N = 1 is no cache, K = 0 no correction."""
    xs = [x]
    for i, (A, B) in enumerate(steps):
        if i % N == 0:
            eps, feature = network.full(x, i)
            y = A * x + B * eps  # Eq. 9
            for _ in range(K):
                eps, feature = network.full(y, i)  # the same t; cached steps go on with this feature
                y = y + lam * (A * x + B * eps - y)  # Eq. 10
        else:  # not corrected: its error comes from the feature, which only a full step renews
            y = A * x + B * network.cached(x, i, feature)
        x = y
        xs.append(x)
    return xs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", default=DIGITS, help="diffusers folder or hub name")
    parser.add_argument("--out", default="minimal.png", help="image grid; one row for each line of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the digits are too small for more; a large model wants them
    pipe = DDIMPipeline.from_pretrained(options.pipeline)
    config, (timesteps, steps) = pipe.unet.config, ddim(pipe.scheduler, 25)
    shape = (2, 8, config.in_channels, config.sample_size, config.sample_size)
    x_calibration, x_T = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    network = Network(pipe.unet, timesteps)
    quantized = quantize(network, sample(network, x_calibration, steps)[:-1])

    rows: list[Tensor] = []
    print(f"{'':24}{'full + cached calls':>21}{'PSNR to the float images':>26}")
    # IEC moves the images of the float model too: Eq. 10 solves for another x_{t-1} than DDIM's.
    for model, N, K in itertools.product((network, quantized), (1, 5), (0, 1)):
        name = "float" if model is network else "quantized"
        name += ", cached" * (N > 1) + ", IEC" * K
        rows.append((sample(model, x_T, steps, N, K)[-1] / 2 + 0.5).clamp(0, 1))
        psnr = -10 * (rows[-1] - rows[0]).square().mean().log10()
        full, cached = len(steps[::N]) * (1 + K), len(steps) - len(steps[::N])
        print(f"{name:24}{full:>13} + {cached:<5}{psnr:23.1f} dB")
    pixels = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).mul(255).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).save(options.out)


if __name__ == "__main__":
    main()
