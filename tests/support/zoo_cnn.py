"""The convolutional networks of the zoo, each a small copy of an architecture that is in common use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # as user code names it


def images(*shape: int, count: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """Makes ``count`` normal tensors (4, *shape), the same ones at every call."""

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(4, *shape, generator=generator) for _ in range(count))

    return inputs


def conv_bn_relu(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def classifier(features: nn.Module, channels: int) -> nn.Sequential:
    """Global average pooling and one linear layer of 10 classes behind ``features``."""
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, -1, height, width)


class LeNet(nn.Module):
    """Convolutions and pooling, flattened with their positions into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 2 * 2, 24)
        self.fc2 = nn.Linear(24, 20)
        self.fc3 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Vgg(nn.Module):
    """VGG with BatchNorm, made from a list of widths, and its classifier with dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for width in (8, 12, "M", 16, 20, "M", 24, "M"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                c_in = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(24 * 4, 32), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))


class SqueezeExcitation(nn.Module):
    """A gate per channel, from its mean over the image."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


def projection(c_in: int, c_out: int, stride: int) -> nn.Module | None:
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions, with squeeze-and-excitation if ``squeezed``."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, squeezed: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.se = SqueezeExcitation(c_out, squeezed) if squeezed else nn.Identity()
        self.downsample = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's block of 1x1, 3x3 and 1x1 convolutions; ResNeXt's with ``groups``."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


class PadBlock(nn.Module):
    """The CIFAR ResNet's block with a shortcut without parameters: every second pixel, new channels zero."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.added = c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, before, self.added - before)))


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice; the projection reads the activated input."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class DenseLayer(nn.Module):
    """BN-ReLU-conv 1x1 and BN-ReLU-conv 3x3, concatenated to the input."""

    def __init__(self, c_in: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, bottleneck, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.dropout(self.conv2(F.relu(self.norm2(x))))


class DenseBlock(nn.ModuleList):
    """Layers that each read all that came before."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class Inception(nn.Module):
    """Branches of kernels 1, 3, 5 and a pooling branch, concatenated."""

    def __init__(self, c_in: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = conv_bn_relu(c_in, one, 1)
        self.branch2 = nn.Sequential(conv_bn_relu(c_in, three[0], 1), conv_bn_relu(three[0], three[1]))
        self.branch3 = nn.Sequential(conv_bn_relu(c_in, five[0], 1), conv_bn_relu(five[0], five[1], 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn_relu(c_in, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (ReLU6), or EfficientNet's MBConv with another activation and ``squeezed``."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        expanded: int,
        stride: int = 1,
        activation: type[nn.Module] = nn.ReLU6,
        squeezed: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != c_in:
            layers += [nn.Conv2d(c_in, expanded, 1, bias=False), nn.BatchNorm2d(expanded), activation()]
        depthwise = nn.Conv2d(expanded, expanded, 3, stride, 1, groups=expanded, bias=False)
        layers += [depthwise, nn.BatchNorm2d(expanded), activation()]
        if squeezed:
            layers.append(SqueezeExcitation(expanded, squeezed, activation))
        layers += [nn.Conv2d(expanded, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class ShuffleUnit(nn.Module):
    """ShuffleNet's unit; with stride 2 it concatenates its pooled input instead of adding it."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int = 1, groups: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        branch = c_out - c_in if stride == 2 else c_out
        self.compress = conv_bn_relu(c_in, width, 1, groups=groups)
        self.depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn_depthwise = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, branch, 1, groups=groups, bias=False)
        self.bn_expand = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(self.compress(x), self.groups)
        out = self.bn_depthwise(self.depthwise(out))
        out = self.bn_expand(self.expand(out))
        if self.stride == 2:
            return F.relu(torch.cat((F.avg_pool2d(x, 3, stride=2, padding=1), out), 1))
        return F.relu(x + out)


def depthwise_bn(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


class ShuffleUnitV2(nn.Module):
    """ShuffleNetV2's unit: one half passes, the other is computed, the channels are shuffled."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        half = c_out // 2
        if stride > 1:
            self.branch1 = nn.Sequential(*depthwise_bn(c_in, stride), conv_bn_relu(c_in, half, 1))
        self.branch2 = nn.Sequential(
            conv_bn_relu(c_in if stride > 1 else half, half, 1),
            *depthwise_bn(half, stride),
            conv_bn_relu(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class GhostModule(nn.Module):
    """Half of the channels by a convolution, the rest from those by a cheap depthwise one."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.c_out = c_out
        primary = (c_out + 1) // 2
        self.primary_conv = conv_bn_relu(c_in, primary, 1)
        self.cheap_operation = conv_bn_relu(primary, primary, 3, groups=primary)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        return torch.cat([x1, x2], dim=1)[:, : self.c_out]


class C2f(nn.Module):
    """YOLO's block: split in two, a chain of convolutions on the last part, all parts concatenated."""

    def __init__(self, c_in: int, hidden: int, c_out: int, n: int = 2) -> None:
        super().__init__()
        self.cv1 = conv_bn_relu(c_in, 2 * hidden, 1)
        self.cv2 = conv_bn_relu((2 + n) * hidden, c_out, 1)
        self.m = nn.ModuleList(conv_bn_relu(hidden, hidden) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, LayerNorm and MLP with the channels last, LayerScale."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(0.1 * torch.ones(dim))  # not ConvNeXt's 1e-6, which would hide the block from a test

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return shortcut + (self.gamma * x).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Two levels down and up, ConvTranspose2d, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = self.double_conv(3, 8)
        self.down1 = self.double_conv(8, 12)
        self.down2 = self.double_conv(12, 20)
        self.pool = nn.MaxPool2d(2)
        self.up1 = nn.ConvTranspose2d(20, 14, 2, stride=2)
        self.conv1 = self.double_conv(12 + 14, 16)
        self.up2 = nn.ConvTranspose2d(16, 10, 2, stride=2)
        self.conv2 = self.double_conv(8 + 10, 9)
        self.outc = nn.Conv2d(9, 2, 1)

    @staticmethod
    def double_conv(c_in: int, c_out: int) -> nn.Sequential:
        return nn.Sequential(conv_bn_relu(c_in, c_out), conv_bn_relu(c_out, c_out))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(self.pool(x1))
        x3 = self.down2(self.pool(x2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        x = self.conv2(torch.cat([x1, self.up2(x)], dim=1))
        return self.outc(x)


class AttentionGate(nn.Module):
    """Attention U-Net's gate: a (N, 1, H, W) map expanded over the channels of the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = conv_bn_relu(3, 10)
        self.mid = conv_bn_relu(10, 14, stride=2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.w_g = nn.Sequential(nn.Conv2d(14, 6, 1), nn.BatchNorm2d(6))
        self.w_x = nn.Sequential(nn.Conv2d(10, 6, 1), nn.BatchNorm2d(6))
        self.psi = nn.Sequential(nn.Conv2d(6, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.dec = conv_bn_relu(10 + 14, 12)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x)
        gate = self.up(self.mid(skip))
        psi = self.psi(F.relu(self.w_g(gate) + self.w_x(skip)))
        skip = skip * psi.expand_as(skip)
        return self.out(self.dec(torch.cat((skip, gate), dim=1)))


class FeaturePyramid(nn.Module):
    """A feature pyramid: lateral 1x1 convolutions, interpolated sums, one shared head, three outputs."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 12, 20)
        self.stages = nn.ModuleList(conv_bn_relu(c, w, stride=2) for c, w in zip((3, *widths), widths, strict=False))
        self.laterals = nn.ModuleList(nn.Conv2d(w, 10, 1) for w in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in widths)
        self.head = nn.Sequential(nn.Conv2d(10, 14, 3, padding=1), nn.ReLU(), nn.Conv2d(14, 5, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        return [self.head(smooth(m)) for smooth, m in zip(self.smooth, maps, strict=True)]


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions: the first padded on the left by F.pad, the second chomped on the right."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.padding = (kernel - 1) * dilation
        self.conv1 = nn.Conv1d(c_in, c_out, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(c_out, c_out, kernel, padding=self.padding, dilation=dilation)
        self.dropout = nn.Dropout(0.1)
        self.downsample = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv1(F.pad(x, (self.padding, 0)))))
        out = self.conv2(out)[:, :, : -self.padding].contiguous()
        out = self.dropout(F.relu(out))
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(out + res)


class Tcn(nn.Module):
    """A temporal convolutional network, read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TemporalBlock(5, 12, 3, 1), TemporalBlock(12, 12, 3, 2), TemporalBlock(12, 16, 2, 4)
        )
        self.linear = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x)[:, :, -1])


class Glu(nn.Module):
    """Gated 1-d convolutions with residuals, as in convolutional language models."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(5, 2 * 12, 3, padding=1)
        self.conv1 = nn.Conv1d(12, 2 * 12, 3, padding=1)
        self.conv2 = nn.Conv1d(12, 2 * 9, 5, padding=2)
        self.head = nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.stem(x), dim=1)
        x = x + F.glu(self.conv1(x), dim=1)
        x = F.glu(self.conv2(x), dim=1)
        return self.head(x.mean(dim=2))


class Gan(nn.Module):
    """A DCGAN, both halves in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(6, 20, 4, 1, 0, bias=False), nn.BatchNorm2d(20), nn.ReLU(True),
            nn.ConvTranspose2d(20, 12, 4, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(True),
            nn.ConvTranspose2d(12, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 10, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(10, 18, 4, 2, 1, bias=False), nn.BatchNorm2d(18), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(18, 1, 4, 1, 0, bias=False), nn.Flatten(),
        )  # fmt: skip

    def forward(self, noise: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(self.generator(noise)), self.discriminator(images)


class ConcatOwnConsumer(nn.Module):
    """A concatenation of two tensors, the second of which is made from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(20, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.conv2(y)
        return self.conv3(torch.cat([y, z], 1))


class ResidualInstanceNorm(nn.Module):
    """Style transfer's residual block: reflection padding, convolution, instance norm."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, hidden, 3), nn.InstanceNorm2d(hidden, affine=True), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(hidden, channels, 3), nn.InstanceNorm2d(channels, affine=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class SharedModule(nn.Module):
    """One block applied three times in a row, then added to its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 10)
        self.block = nn.Sequential(
            nn.Conv2d(10, 14, 3, padding=1), nn.ReLU(), nn.Conv2d(14, 10, 3, padding=1), nn.Tanh()
        )
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        residual = x
        for _ in range(3):
            x = self.block(x)
        return self.head((x + residual).mean((2, 3)))


class Siamese(nn.Module):
    """The distance of two images, per feature, into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv_bn_relu(3, 8),
            nn.MaxPool2d(2),
            conv_bn_relu(8, 14),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(14 * 16, 20),
        )
        self.fc = nn.Linear(20, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(torch.abs(self.encoder(a) - self.encoder(b)))


class Film(nn.Module):
    """Channels scaled and shifted by a linear layer of a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12, affine=False)
        self.film = nn.Linear(5, 2 * 12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).chunk(2, dim=1)
        x = self.bn(self.conv1(x))
        x = F.relu(x * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 1)
        return self.fc(x.flatten(1))


class NonLocal(nn.Module):
    """Self-attention over the pixels of an image, as in SAGAN."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.size()
        query = self.query(x).flatten(2).permute(0, 2, 1)
        attention = torch.softmax(torch.bmm(query, self.key(x).flatten(2)), dim=-1)
        out = torch.bmm(self.value(x).flatten(2), attention.permute(0, 2, 1))
        return self.gamma * out.view(batch, channels, height, width) + x


def resnet_basic() -> nn.Module:
    blocks = [BasicBlock(8, 8), BasicBlock(8, 16, 2), BasicBlock(16, 16), BasicBlock(16, 24, 2)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *blocks), 24)


def resnet_bottleneck() -> nn.Module:
    blocks = [Bottleneck(8, 6, 20), Bottleneck(20, 10, 20), Bottleneck(20, 12, 28, 2)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), nn.MaxPool2d(3, 2, 1), *blocks), 28)


def resnet_pad() -> nn.Module:
    return classifier(nn.Sequential(conv_bn_relu(3, 8), PadBlock(8, 8), PadBlock(8, 14, 2), PadBlock(14, 21, 2)), 21)


def resnext() -> nn.Module:
    blocks = [Bottleneck(8, 12, 20, groups=4), Bottleneck(20, 16, 20, groups=4), Bottleneck(20, 18, 28, 2, groups=3)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *blocks), 28)


def preact_resnet() -> nn.Module:
    blocks = [PreActBlock(8, 8), PreActBlock(8, 14, 2), PreActBlock(14, 14), PreActBlock(14, 22, 2)]
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return classifier(nn.Sequential(stem, *blocks, nn.BatchNorm2d(22), nn.ReLU()), 22)


def densenet() -> nn.Module:
    transition = [nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 11, 1, bias=False), nn.AvgPool2d(2)]
    first = DenseBlock(DenseLayer(8 + 4 * i, 4, 10) for i in range(3))
    second = DenseBlock(DenseLayer(11 + 6 * i, 6, 12) for i in range(2))
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return classifier(nn.Sequential(stem, first, *transition, second, nn.BatchNorm2d(23), nn.ReLU()), 23)


def inception() -> nn.Module:
    blocks = [Inception(8, 5, (6, 9), (4, 7), 3), nn.MaxPool2d(2), Inception(24, 8, (7, 10), (3, 6), 4)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *blocks), 28)


def mobilenet_v2() -> nn.Module:
    blocks = [InvertedResidual(8, 6, 8), InvertedResidual(6, 10, 18, 2), InvertedResidual(10, 10, 30)]
    last = [nn.Conv2d(10, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
    return classifier(nn.Sequential(conv_bn_relu(3, 8, stride=2), *blocks, *last), 24)


def efficientnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    blocks = [
        InvertedResidual(8, 6, 8, activation=nn.SiLU, squeezed=2),
        InvertedResidual(6, 10, 24, 2, activation=nn.SiLU, squeezed=4),
        InvertedResidual(10, 10, 30, activation=nn.SiLU, squeezed=5),
    ]
    last = [nn.Conv2d(10, 28, 1, bias=False), nn.BatchNorm2d(28), nn.SiLU()]
    return classifier(nn.Sequential(*stem, *blocks, *last), 28)


def shufflenet() -> nn.Module:
    units = [ShuffleUnit(8, 6, 20, stride=2), ShuffleUnit(20, 8, 20), ShuffleUnit(20, 10, 32, stride=2)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *units), 32)


def shufflenet_v2() -> nn.Module:
    units = [ShuffleUnitV2(8, 20, 2), ShuffleUnitV2(20, 20), ShuffleUnitV2(20, 28, 2), ShuffleUnitV2(28, 28)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *units, conv_bn_relu(28, 32, 1)), 32)


def se_resnet() -> nn.Module:
    blocks = [BasicBlock(8, 8, squeezed=4), BasicBlock(8, 16, 2, squeezed=6), BasicBlock(16, 16, squeezed=7)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *blocks), 16)


def ghost() -> nn.Module:
    return classifier(nn.Sequential(conv_bn_relu(3, 8), GhostModule(8, 15), nn.MaxPool2d(2), GhostModule(15, 20)), 20)


def depthwise_multiplier() -> nn.Module:
    """Depthwise convolutions with two outputs for each input."""
    separable = [conv_bn_relu(8, 16, 3, groups=8), conv_bn_relu(16, 10, 1), conv_bn_relu(10, 20, 3, 2, groups=10)]
    return classifier(nn.Sequential(conv_bn_relu(3, 8), *separable), 20)


def c2f() -> nn.Module:
    return classifier(
        nn.Sequential(conv_bn_relu(3, 8), C2f(8, 6, 14), conv_bn_relu(14, 18, 3, 2), C2f(18, 7, 22, 1)), 22
    )


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 10, 2, stride=2), LayerNorm2d(10)]
    down = [LayerNorm2d(10), nn.Conv2d(10, 14, 2, stride=2)]
    blocks = [ConvNextBlock(10, 24), ConvNextBlock(10, 20), *down, ConvNextBlock(14, 32)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), LayerNorm2d(14), nn.Flatten(), nn.Linear(14, 10))


def nonlocal_net() -> nn.Module:
    return classifier(nn.Sequential(conv_bn_relu(3, 10, stride=2), NonLocal(10, 6), conv_bn_relu(10, 14)), 14)


def cnn3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
        nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(12), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(12, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 5),
    )  # fmt: skip


def grouped_transposed() -> nn.Module:
    """Transposed convolutions: two groups, then one group for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 3, 2, 1, output_padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 3, 1),
    )  # fmt: skip


def pixel_shuffle() -> nn.Module:
    """ESPCN; the inner shuffle puts its channels in front of another convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 5 * 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(5, 9, 3, padding=1), nn.Tanh(), nn.Conv2d(9, 3 * 4, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    encoder = [conv_bn_relu(3, 8, stride=2), conv_bn_relu(8, 14, stride=2), nn.Conv2d(14, 6, 1)]
    up = [nn.Upsample(scale_factor=2), conv_bn_relu(6, 12), nn.Upsample(scale_factor=2), conv_bn_relu(12, 10)]
    return nn.Sequential(nn.Sequential(*encoder), nn.Sequential(*up, nn.Conv2d(10, 3, 3, padding=1), nn.Sigmoid()))


def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, 8, 7), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 14, 3, 2, 1), nn.InstanceNorm2d(14, affine=True), nn.ReLU(),
        ResidualInstanceNorm(14, 10), ResidualInstanceNorm(14, 18), nn.Upsample(scale_factor=2),
        nn.ReflectionPad2d(1), nn.Conv2d(14, 9, 3), nn.InstanceNorm2d(9, affine=True), nn.ReLU(),
        nn.ReflectionPad2d(3), nn.Conv2d(9, 3, 7), nn.Tanh(),
    )  # fmt: skip


def group_norm() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.ReLU(),
        nn.Conv2d(12, 18, 3, 2, 1), nn.GroupNorm(3, 18), nn.SiLU(),
        nn.Conv2d(18, 10, 3, padding=1), nn.GroupNorm(1, 10), nn.ReLU(), nn.Dropout2d(0.1),
    )  # fmt: skip
    return classifier(features, 10)


def prelu() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(num_parameters=8),
        nn.Conv2d(8, 14, 3, 2, 1), nn.BatchNorm2d(14), nn.PReLU(num_parameters=14),
        nn.Conv2d(14, 10, 3, padding=1), nn.PReLU(),
    )  # fmt: skip
    return classifier(features, 10)


def noise_and_images() -> tuple[Tensor, ...]:
    return *images(6, 1, 1)(), *images(3, 16, 16)()


def images_and_conditions() -> tuple[Tensor, ...]:
    return *images(3, 16, 16)(), *images(5)()


RGB = images(3, 16, 16)
CNN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "lenet": (LeNet, RGB),
    "vgg_bn": (Vgg, RGB),
    "resnet_basic": (resnet_basic, RGB),
    "resnet_bottleneck": (resnet_bottleneck, RGB),
    "resnet_pad": (resnet_pad, RGB),
    "preact_resnet": (preact_resnet, RGB),
    "se_resnet": (se_resnet, RGB),
    "resnext": (resnext, RGB),
    "densenet": (densenet, RGB),
    "inception": (inception, RGB),
    "mobilenet_v2": (mobilenet_v2, RGB),
    "efficientnet": (efficientnet, RGB),
    "shufflenet": (shufflenet, RGB),
    "shufflenet_v2": (shufflenet_v2, RGB),
    "ghost": (ghost, RGB),
    "depthwise_multiplier": (depthwise_multiplier, RGB),
    "c2f": (c2f, RGB),
    "convnext": (convnext, RGB),
    "unet": (UNet, RGB),
    "attention_gate": (AttentionGate, RGB),
    "feature_pyramid": (FeaturePyramid, RGB),
    "autoencoder": (autoencoder, RGB),
    "grouped_transposed": (grouped_transposed, images(3, 8, 8)),
    "pixel_shuffle": (pixel_shuffle, images(3, 8, 8)),
    "gan": (Gan, noise_and_images),
    "concat_own_consumer": (ConcatOwnConsumer, RGB),
    "shared_module": (SharedModule, RGB),
    "instance_norm": (instance_norm, RGB),
    "group_norm": (group_norm, RGB),
    "prelu": (prelu, RGB),
    "nonlocal": (nonlocal_net, RGB),
    "film": (Film, images_and_conditions),
    "siamese": (Siamese, images(3, 16, 16, count=2)),
    "tcn": (Tcn, images(5, 20)),
    "glu": (Glu, images(5, 20)),
    "cnn3d": (cnn3d, images(2, 6, 12, 12)),
}
