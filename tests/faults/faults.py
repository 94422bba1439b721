"""The faults: each replaces one piece of one line, and the tests of its area should fail.

``old`` occurs exactly once in ``file``.  ``tests`` is what follows ``pytest`` on the command line.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def op(body: str, *names: str, also: str = "") -> str:
    """The tests of ops by one implementation: the generic ones, each op's own, and its tests in a further file."""
    own = " ".join(f"tests/ops/test_{name}.py" for name in [*names, *also.split()])
    return f"tests/ops/test_specs.py {own} -k '({' or '.join(names)}) and {body}'"


INTERPRETER = "interpreter and not test_gradients"  # gradcheck takes minutes there


REFERENCE = [
    Fault(
        "inverse log-det keeps its sign",
        "fastflow/ops/actnorm/reference.py",
        "(-log_det if inverse else log_det).repeat",
        "log_det.repeat",
        "tests/ops/test_actnorm.py -k reference",
    ),
    Fault(
        "gradient of the log-det added in the inverse",
        "fastflow/ops/actnorm/reference.py",
        "dlog_scale = -channel_sum(dx * x.to(acc)) - dlog_scale",
        "dlog_scale = -channel_sum(dx * x.to(acc)) + dlog_scale",
        "tests/ops/test_actnorm.py -k reference",
    ),
    Fault(
        "the other half is transformed",
        "fastflow/ops/affine_coupling/reference.py",
        "x.chunk(2, dim=1)[0 if swap_halves else 1].to(acc)",
        "x.chunk(2, dim=1)[1 if swap_halves else 0].to(acc)",
        "tests/ops/test_affine_coupling.py -k reference",
    ),
    Fault(
        "gradient of tanh without its factor",
        "fastflow/ops/affine_coupling/reference.py",
        "return g * f * (1 - th * th), channel_sum(g * th)",
        "return g * (1 - th * th), channel_sum(g * th)",
        "tests/ops/test_affine_coupling.py -k reference",
    ),
    Fault(
        "raw scale under the mask reaches tanh",
        "fastflow/ops/affine_coupling/reference.py",
        "raw = None if raw is None else torch.where(transformed, raw, zero)",
        "raw = None if raw is None else raw",
        "tests/ops/test_affine_coupling.py -k reference",
    ),
    Fault(
        "weight gradient transposed",
        "fastflow/ops/conv1x1/reference.py",
        "dweight = rows.mT @ columns",
        "dweight = columns.mT @ rows",
        "tests/ops/test_conv1x1.py -k reference",
    ),
    Fault(
        "1 - p right only for a symmetric logit",
        "fastflow/ops/dequantize/reference.py",
        "* (scale / bins) + (1 - scale - shift)",
        "* (scale / bins) + shift",
        "tests/ops/test_dequantize.py -k reference",
    ),
    Fault(
        "log scale's gradient without the normalizer",
        "fastflow/ops/gaussian/reference.py",
        "lambda: g * (e * e - 1)",
        "lambda: g * (e * e)",
        "tests/ops/test_gaussian.py -k reference",
    ),
    Fault(
        "sign of the inverse matrix's gradient",
        "fastflow/ops/lu_weight/reference.py",
        "dweight - weight_inverse.mT @ dweight_inverse",
        "dweight + weight_inverse.mT @ dweight_inverse",
        "tests/ops/test_lu_weight.py -k reference",
    ),
    Fault(
        "high word of the sample's index lost",
        "fastflow/ops/noise/reference.py",
        "(sample >> 32) + zero",
        "zero",
        "tests/ops/test_noise.py",
    ),
    Fault(
        "two pixels of a block exchanged",
        "fastflow/ops/squeeze/reference.py",
        "REALNVP_PIXELS = (0, 3, 1, 2)",
        "REALNVP_PIXELS = (0, 3, 2, 1)",
        "tests/ops/test_squeeze.py -k reference",
    ),
    Fault(
        "gradient of A ignores the transpose",
        "fastflow/ops/triangular_solve/reference.py",
        "dA = -(X @ dB.mT if transpose else dB @ X.mT)",
        "dA = -(dB @ X.mT)",
        "tests/ops/test_triangular_solve.py -k reference",
    ),
]

TRITON = [
    Fault(
        "log-det only of the first block of vectors",
        "triton_kernels/actnorm.py",
        "if (block == 0) | (VECTORS & (block % tl.cdiv(K, TILE_K) == 0)):",
        "if block == 0:",
        op(INTERPRETER, "actnorm", also="large"),
    ),
    Fault(
        "dropped mask in a sum over positions",
        "triton_kernels/actnorm.py",
        "b_dlog_scale += tl.where(mask, b_dx * b_shifted + b_dlog_det, 0.0)",
        "b_dlog_scale += b_dx * b_shifted + b_dlog_det",
        op(INTERPRETER, "actnorm"),
    ),
    Fault(
        "merged variance without the count",
        "triton_kernels/actnorm.py",
        "delta * delta * count * weight",
        "delta * delta * weight",
        op(INTERPRETER, "actnorm", also="large"),
    ),
    Fault(
        "log-det sums what lies outside the tile",
        "triton_kernels/affine_coupling.py",
        "tl.where(mask & active, log_scale_of(b_raw, b_f, SCALE), 0.0)",
        "tl.where(active, log_scale_of(b_raw, b_f, SCALE), 0.0)",
        op(INTERPRETER, "affine_coupling"),
    ),
    Fault(
        "checkerboard of rows counted by the height",
        "triton_kernels/affine_coupling.py",
        "parity = p // W + p % W + 0 * k",
        "parity = p // H + p % H + 0 * k",
        op(INTERPRETER, "affine_coupling"),
    ),
    Fault(
        "slots of two sums overlap",
        "triton_kernels/gaussian.py",
        "        at_slot += slot.to(tl.int64) * K",
        "        at_slot += slot.to(tl.int64)",
        op(INTERPRETER, "gaussian"),
    ),
    Fault(
        "log-sigmoid counted once, not twice",
        "triton_kernels/dequantize.py",
        "-tl.abs(p) - 2 * tl.log(1 + e)",
        "-tl.abs(p) - tl.log(1 + e)",
        op(INTERPRETER, "dequantize"),
    ),
    Fault(
        "even and odd columns exchanged",
        "triton_kernels/dequantize.py",
        "even, odd = tl.split(tl.reshape(b_y, [TILE_B, 4, 2]))",
        "odd, even = tl.split(tl.reshape(b_y, [TILE_B, 4, 2]))",
        op(INTERPRETER, "dequantize"),
    ),
    Fault(
        "angle not reduced to an eighth of a turn",
        "triton_kernels/noise.py",
        "quadrant = (w + 0x20000000) >> 30",
        "quadrant = w >> 30",
        op(INTERPRETER, "noise", "gaussian"),
    ),
    Fault(
        "order of pixels transposed",
        "triton_kernels/squeeze.py",
        "(3 * di + 2 * dj - 4 * di * dj)",
        "(2 * di + 3 * dj - 4 * di * dj)",
        op(INTERPRETER, "squeeze"),
    ),
    Fault(
        "off-by-one number of slots",
        "triton_kernels/tiles.py",
        "return -(-self.position_blocks // tiles_per_program), tiles_per_program",
        "return self.position_blocks // tiles_per_program, tiles_per_program",
        "tests/ops/test_tiles.py " + op(f"{INTERPRETER} or test_tiles", "actnorm", also="large"),
    ),
    Fault(
        "width of vectors ignores the number of channels",
        "triton_kernels/tiles.py",
        "vec_k = math.gcd(16, k, *",
        "vec_k = math.gcd(16, *",
        op(INTERPRETER, "actnorm", "affine_coupling"),
    ),
]

CUDA = [
    Fault(
        "bias added where it is to be taken away",
        "csrc/conv1x1/kernels.h",
        "v.value[j] -= bias[channel + j];",
        "v.value[j] += bias[channel + j];",
        op("emulated", "conv1x1", also="emulated"),
    ),
    Fault(
        "last pixel of a tile left out of the weight's gradient",
        "csrc/conv1x1/kernels.h",
        "for (int pixel = slice; pixel < TILE; pixel += SLICES) {",
        "for (int pixel = slice; pixel < TILE - 1; pixel += SLICES) {",
        op("emulated", "conv1x1", also="emulated"),
    ),
    Fault(
        "blocks that share a tile store other channels",
        "csrc/conv1x1/kernels.h",
        "channel / 4 % parts != part",
        "channel % parts != part",
        op("emulated", "conv1x1", also="emulated"),
    ),
    Fault(
        "only the first 32 slots are summed",
        "csrc/conv1x1/kernels.h",
        "slot < count; slot += SEGMENTS)",
        "slot < count && slot < SEGMENTS; slot += SEGMENTS)",
        op("emulated", "conv1x1", also="emulated"),
    ),
    Fault(
        "weight not transposed for the input's gradient",
        "csrc/conv1x1/kernels.h",
        "{matrix_of<acc>(weight).transposed()}",
        "{matrix_of<acc>(weight)}",
        op("emulated", "conv1x1", also="emulated"),
    ),
    Fault(
        "off-by-one column in a substitution",
        "csrc/lu_weight/kernels.h",
        "for (int j = column; j <= step; j += COLUMNS)",
        "for (int j = column; j < step; j += COLUMNS)",
        op("emulated", "lu_weight", also="emulated"),
    ),
    Fault(
        "reciprocal of the column, not of the row",
        "csrc/lu_weight/kernels.h",
        "weight_inverse(k, i * channels + j) = reciprocal[i] * sum;",
        "weight_inverse(k, i * channels + j) = reciprocal[j] * sum;",
        op("emulated", "lu_weight", also="emulated"),
    ),
    Fault(
        "gradient of the log-det left out",
        "csrc/lu_weight/kernels.h",
        "dlog_s(k, i) = sum * third(i, i) + dlog_det[k];",
        "dlog_s(k, i) = sum * third(i, i);",
        op("emulated", "lu_weight", also="emulated"),
    ),
    Fault(
        "swallowed error: NaN on a diagonal",
        "csrc/lu_weight/kernels.h",
        "if (!is_finite_nonzero(d)) *fault",
        "if (d == T(0)) *fault",
        op("emulated", "lu_weight", also="emulated"),
    ),
    Fault(
        "sums not cleared for the next rows",
        "csrc/triangular_solve/kernels.h",
        "c.sum[j] = T(0);",
        "",
        op("emulated", "triangular_solve", also="emulated"),
    ),
    Fault(
        "divisor of a block's last row not written",
        "csrc/triangular_solve/kernels.h",
        "if (thread < ROWS) diagonal[thread] = divisor(k, top + thread);",
        "if (thread < ROWS - 1) diagonal[thread] = divisor(k, top + thread);",
        op("emulated", "triangular_solve", also="emulated"),
    ),
]

CPU = [
    Fault(
        "bias's gradient without the scale",
        "csrc/actnorm/cpu.cpp",
        "inverse ? -sum_of_dy : sum_of_dy * parameters.scale.get()[k]",
        "inverse ? -sum_of_dy : sum_of_dy",
        op("compiled", "actnorm"),
    ),
    Fault(
        "variance around the first value, not the mean",
        "csrc/actnorm/cpu.cpp",
        "count ? square - sum * sum / count : 0",
        "count ? square : 0",
        op("compiled", "actnorm"),
    ),
    Fault(
        "gradient of the factor by tanh's formula",
        "csrc/affine_coupling/coupling.cpp",
        "by_factor = soft ? th - a * slope : th;",
        "by_factor = th;",
        op("compiled", "affine_coupling"),
    ),
    Fault(
        "dropped mask on the shift's gradient",
        "csrc/affine_coupling/coupling.cpp",
        "M::store(c.dshift + i, masked<M>(c.active, i, dshift));",
        "M::store(c.dshift + i, dshift);",
        op("compiled", "affine_coupling"),
    ),
    Fault(
        "checkerboard of vectors along the wrong axis",
        "csrc/affine_coupling/cpu.cpp",
        "active_along_lines(grid.vectors || !grid.rows)",
        "active_along_lines(!grid.rows)",
        op("compiled", "affine_coupling"),
    ),
    Fault(
        "log-density halves the log scale",
        "csrc/gaussian/cpu.cpp",
        "e * e + 2 * at<M>(d.log_scale, l, i)",
        "e * e + at<M>(d.log_scale, l, i)",
        op("compiled", "gaussian"),
    ),
    Fault(
        "noise of a tile from its block's first number",
        "csrc/dequantize/cpu.cpp",
        "if (t.samples == 1) return u + t.from % UNIFORM;",
        "if (t.samples == 1) return u;",
        op("compiled", "dequantize"),
    ),
    Fault(
        "high word of the sample's index lost in vectors",
        "csrc/noise/cpu.cpp",
        "counters.word[3][i] = static_cast<uint32_t>(sample >> 32);",
        "counters.word[3][i] = 0;",
        op("compiled", "noise", "dequantize"),
    ),
    Fault(
        "next sample not reached in planes",
        "csrc/squeeze/cpu.cpp",
        "if (++c == m.c) c = 0, ++n;",
        "if (++c == m.c) c = 0;",
        op("compiled", "squeeze"),
    ),
    Fault(
        "diagonal's gradient without the diagonal",
        "csrc/lu_weight/cpu.cpp",
        "product(i, i) * s.get()[i] + dlog_det(k)",
        "product(i, i) + dlog_det(k)",
        op("compiled", "lu_weight"),
    ),
    Fault(
        "swallowed error: inf on a diagonal",
        "csrc/cpu/diagonal.h",
        "if (d == T(0) || !std::isfinite(d)) found(matrix, index, d);",
        "if (d == T(0) || std::isnan(d)) found(matrix, index, d);",
        op("compiled", "triangular_solve", "lu_weight"),
    ),
    Fault(
        "last slot left out of a sum",
        "csrc/cpu/tiles.h",
        "for (int64_t slot = 1; slot < slots; ++slot)",
        "for (int64_t slot = 1; slot < slots - 1; ++slot)",
        op("compiled", "actnorm", "gaussian"),
    ),
]

DISPATCH = [
    Fault(
        "autocast of the CPU reaches an op's products",
        "fastflow/ops/registry.py",
        "if not torch._C._is_any_autocast_enabled():",
        'if not torch.is_autocast_enabled("cuda"):',
        "tests/ops/test_conv1x1.py tests/ops/test_backend.py -k 'autocast or test_backend'",
    ),
    Fault(
        "forward mode passes an op without its error",
        "fastflow/ops/registry.py",
        "if torch.is_grad_enabled() or forward_ad._current_level >= 0:",
        "if torch.is_grad_enabled():",
        "tests/ops/test_actnorm.py tests/ops/test_backend.py tests/ops/test_errors.py -k 'not interpreter'",
    ),
    Fault(
        "kernels launched for an empty batch",
        "fastflow/ops/dispatch.py",
        "if self.triton and on_gpu_or_told and tensor.numel() and _runs_kernels(tensor.device):",
        "if self.triton and on_gpu_or_told and _runs_kernels(tensor.device):",
        op(INTERPRETER, "actnorm"),
    ),
    Fault(
        "backend of an outer block lost",
        "fastflow/ops/dispatch.py",
        "_backend = self.previous",
        '_backend = "auto"',
        "tests/ops/test_backend.py",
    ),
    Fault(
        "second derivative silently wrong",
        "fastflow/ops/registry.py",
        "if not differentiable_backward:",
        "if False:",
        "tests/ops/test_affine_coupling.py -k 'reference and double'",
    ),
    Fault(
        "gradient of log-sigmoid at twice the place",
        "fastflow/ops/dequantize/reference.py",
        "torch.tanh(y.to(acc_dtype(y.dtype)) / 2)",
        "torch.tanh(y.to(acc_dtype(y.dtype)))",
        "tests/ops/test_dequantize.py -k reference",
    ),
    Fault(
        "sample's gradient by the log scale holds the mean",
        "fastflow/ops/gaussian/reference.py",
        "gradient(log_scale, dz * (z - m))",
        "gradient(log_scale, dz * z)",
        "tests/ops/test_gaussian.py -k reference",
    ),
    Fault(
        "swallowed error: an extension that does not load",
        "fastflow/ops/extension.py",
        '_warn("fastflow._C", error)',
        "pass",
        "tests/project/test_optional_dependencies.py",
    ),
]

LAYERS = [
    Fault(
        "lost flag: a checkpoint is initialized again",
        "fastflow/nn/actnorm.py",
        "self.initialized.fill_(True)",
        "pass",
        "tests/nn/test_modules.py tests/test_checkpoint.py",
    ),
    Fault(
        "rounding of a constant channel scaled up",
        "fastflow/nn/actnorm.py",
        "std <= 1e-6 * mean.abs() + torch.finfo(std.dtype).tiny",
        "std <= torch.finfo(std.dtype).tiny",
        "tests/nn/test_modules.py",
    ),
    Fault(
        "dropped mask on the gradient through the network",
        "fastflow/nn/affine_coupling.py",
        "dx.add_(self.network_input(dx_a))",
        "dx.add_(dx_a)",
        "tests/reversible/test_reversible_rules.py tests/nn/test_modules.py",
    ),
    Fault(
        "gradient of the variance not shared with the past",
        "fastflow/nn/batch_norm.py",
        "var = new_var + share * (batch_var - batch_var.detach())",
        "var = new_var + (batch_var - batch_var.detach())",
        "tests/nn/test_batch_norm.py",
    ),
    Fault(
        "mean over samples, not over positions",
        "fastflow/nn/batch_norm.py",
        "each = self._share() / (x.shape[0] * positions(x))",
        "each = self._share() / x.shape[0]",
        "tests/nn/test_batch_norm.py",
    ),
    Fault(
        "log-det of one position only",
        "fastflow/nn/conv1x1.py",
        "return (positions(x) * log_det).to(",
        "return log_det.to(",
        "tests/nn/test_modules.py",
    ),
    Fault(
        "permutation applied twice instead of undone",
        "fastflow/nn/permute.py",
        "torch.argsort(self.perm)",
        "self.perm",
        "tests/nn/test_modules.py",
    ),
    Fault(
        "inverse weights not corrected for rounding",
        "fastflow/nn/glow_level.py",
        "return (v - v @ (w @ v)).float()",
        "return (v - v).float()",
        "tests/nn/test_modules.py tests/models/test_glow.py tests/reversible/test_reversible.py",
    ),
    Fault(
        "log-det of the logit's slope counted once",
        "fastflow/nn/variational_dequantize.py",
        "math.log(self.scale) * math.prod(p.shape[1:])",
        "math.log(self.scale)",
        "tests/nn/test_variational_dequantize.py",
    ),
    Fault(
        "swallowed error: NaN passes the check",
        "fastflow/nn/flow.py",
        "if e is not None and not e <= self.tolerance",
        "if e is not None and e > self.tolerance",
        "tests/nn/test_flow.py",
    ),
    Fault(
        "hooks of an inner chain passed by",
        "fastflow/nn/sequential.py",
        "if alike and not has_hooks(flow) and flow",
        "if alike and flow",
        "tests/nn/test_flow.py tests/reversible/test_reversible.py",
    ),
]

NETWORKS = [
    Fault(
        "learned scale without its factor of 3",
        "fastflow/nn/networks/glow_network.py",
        "scale = (3 * self.logs).exp()",
        "scale = self.logs.exp()",
        "tests/nn/test_modules.py tests/models/test_glow.py",
    ),
    Fault(
        "folded bias without its scale",
        "fastflow/nn/networks/glow_network.py",
        "weight, self.actnorm.bias * scale",
        "weight, self.actnorm.bias",
        "tests/nn/test_modules.py tests/models/test_glow.py",
    ),
    Fault(
        "input seen twice with the same sign",
        "fastflow/nn/networks/residual_network.py",
        "torch.relu(torch.cat([x, -x], dim=1))",
        "torch.relu(torch.cat([x, x], dim=1))",
        "tests/nn/test_modules.py tests/models/test_models.py",
    ),
    Fault(
        "value and gate exchanged",
        "fastflow/nn/networks/gated_network.py",
        "value, gate = self.conv_out",
        "gate, value = self.conv_out",
        "tests/nn/test_modules.py tests/models/test_published.py",
    ),
    Fault(
        "logit of 0 in one of 2^32 samples",
        "fastflow/nn/priors/logistic.py",
        "(low + 2**-17) * 2**-16",
        "low * 2**-16",
        "tests/nn/test_priors.py",
    ),
    Fault(
        "weights of a mixture not normalized",
        "fastflow/nn/priors/mixture.py",
        "self.logit.log_softmax(0)",
        "self.logit",
        "tests/nn/test_priors.py",
    ),
    Fault(
        "temperature lost",
        "fastflow/nn/priors/gaussian.py",
        "temperature=temperature,",
        "temperature=1.0,",
        "tests/nn/test_priors.py",
    ),
]

MODELS = [
    Fault(
        "log-density of the split latents left out",
        "fastflow/models/model.py",
        "log_prob = log_prob + log_prob_z",
        "log_prob = log_prob + 0 * log_prob_z",
        "tests/models/test_glow.py",
    ),
    Fault(
        "temperature lost at the fine levels",
        "fastflow/models/model.py",
        "split.sample(y, temperature, generator)",
        "split.sample(y, 1.0, generator)",
        "tests/models/test_glow.py tests/models/test_models.py",
    ),
    Fault(
        "eval mode lost by initialization",
        "fastflow/models/model.py",
        "module.train(before)",
        "module.train()",
        "tests/models/test_glow.py tests/models/test_models.py",
    ),
    Fault(
        "off-by-one class accepted",
        "fastflow/models/model.py",
        "int(context.max()) < self.classes",
        "int(context.max()) <= self.classes",
        "tests/ops/test_errors.py",
    ),
    Fault(
        "other pixels of a block leave first",
        "fastflow/models/realnvp.py",
        "for pixel in (0, 3, 1, 2)",
        "for pixel in (0, 1, 2, 3)",
        "tests/models/test_models.py -k 'realnvp and (order or alternate or published)'",
    ),
    Fault(
        "channel couplings all transform one half",
        "fastflow/models/realnvp.py",
        'coupling(c, hidden, "halves", i % 2 == 1)',
        'coupling(c, hidden, "halves", False)',
        "tests/models/test_models.py -k 'realnvp and (order or alternate or published)'",
    ),
    Fault(
        "couplings of vectors do not alternate",
        "fastflow/models/nice.py",
        "AdditiveCoupling(net, swap_halves=i % 2 == 1)",
        "AdditiveCoupling(net, swap_halves=False)",
        "tests/models/test_models.py -k nice",
    ),
    Fault(
        "lost option: the prior is not learned",
        "fastflow/models/glow.py",
        "GaussianPrior((c, h, w), config.classes, config.learned_prior)",
        "GaussianPrior((c, h, w), config.classes)",
        "tests/models/test_models.py tests/models/test_glow.py -k 'size or parameter or prior'",
    ),
]

CHAIN = "tests/reversible/test_state.py tests/reversible/test_reversible.py"

REVERSIBLE = [
    Fault(
        "gradients of shared parameters replaced, not added",
        "fastflow/reversible/vjp.py",
        "gradients[v] = gradients[v] + g if v in gradients else g",
        "gradients[v] = g",
        CHAIN,
    ),
    Fault(
        "cache of parametrizations used without gradients",
        "fastflow/reversible/state.py",
        "cached, parametrize._cache_enabled = parametrize._cache_enabled, 0",
        "cached = parametrize._cache_enabled",
        CHAIN,
    ),
    Fault(
        "lost flag: a step initializes itself again",
        "fastflow/reversible/state.py",
        "after.clone() if _is_flag(after) else before",
        "before",
        CHAIN,
    ),
    Fault(
        "training mode of the forward pass forgotten",
        "fastflow/reversible/state.py",
        "m.training = not training",
        "m.training = training",
        CHAIN,
    ),
    Fault(
        "a parameter in other memory goes unnoticed",
        "fastflow/reversible/state.py",
        "if before != now:",
        "if before[0] != now[0]:",
        CHAIN,
    ),
    Fault(
        "fused optimizers go unnoticed",
        "fastflow/reversible/state.py",
        'if group.get("fused"):',
        'if group.get("foreach"):',
        CHAIN,
    ),
    Fault(
        "gradient of the context stops at the first parameter",
        "fastflow/reversible/segments.py",
        "if self.shared_args is not None or (context is not None and context.requires_grad):",
        "if self.shared_args is not None:",
        CHAIN,
    ),
    Fault(
        "swallowed error: second derivatives",
        "fastflow/reversible/segments.py",
        "if torch.is_grad_enabled():  # create_graph=True",
        "if False:",
        CHAIN,
    ),
]

TRAINER = [
    Fault(
        "gradient not multiplied by the number of ranks",
        "fastflow/trainer/step.py",
        "(bits.sum() * (self.ranks.world_size / self.batch_size)).backward()",
        "(bits.sum() / self.batch_size).backward()",
        "tests/trainer/test_ranks.py",
    ),
    Fault(
        "parts of a batch draw the same noise",
        "fastflow/trainer/step.py",
        "seed=self.seed, offset=self.first + first)",
        "seed=self.seed, offset=self.first)",
        "tests/trainer/test_step.py",
    ),
    Fault(
        "swallowed error: an infinite loss updates the weights",
        "fastflow/trainer/step.py",
        "bad = ~(report[0].isfinite() & norm.isfinite())",
        "bad = ~norm.isfinite()",
        "tests/trainer/test_step.py tests/trainer/test_train.py -k finite",
    ),
    Fault(
        "gradients of a bad step overwritten",
        "fastflow/trainer/step.py",
        "norm.masked_fill(bad, 0)",
        "norm",
        "tests/trainer/test_step.py tests/trainer/test_train.py -k 'finite or diagnosis'",
    ),
    Fault(
        "skipped all-reduce of running statistics",
        "fastflow/trainer/step.py",
        "mean = self.ranks.all_reduce_sum(flat) / self.ranks.world_size",
        "mean = flat",
        "tests/trainer/test_ranks.py -k statistics",
    ),
    Fault(
        "variance between ranks left out",
        "fastflow/distributed.py",
        "(variances + (means - whole) ** 2)",
        "variances",
        "tests/trainer/test_ranks.py -k statistics",
    ),
    Fault(
        "statistics initialized from the same noise on each rank",
        "fastflow/trainer/run.py",
        "seed=seed, offset=self.part[0])",
        "seed=seed, offset=0)",
        "tests/trainer/test_ranks.py -k 'what_one_process or statistics'",
    ),
    Fault(
        "every epoch in the same order",
        "fastflow/trainer/data/batches.py",
        "derive(self.seed, Stream.PERMUTATION, epoch)",
        "derive(self.seed, Stream.PERMUTATION)",
        "tests/trainer/test_data.py",
    ),
    Fault(
        "held-out files depend on where the folder is",
        "fastflow/trainer/data/folder.py",
        "hashlib.sha256(f.relative_to(path).as_posix().encode())",
        "hashlib.sha256(f.as_posix().encode())",
        "tests/trainer/test_data.py",
    ),
    Fault(
        "mirroring goes with the column of a crop",
        "fastflow/trainer/data/batches.py",
        "uniform[:, 3] < 0.5",
        "uniform[:, 2] < 0.5",
        "tests/trainer/test_data.py",
    ),
    Fault(
        "a loader draws from the global generator",
        "fastflow/trainer/data/batches.py",
        "generator=torch.Generator(),",
        "generator=None,",
        "tests/trainer/test_data.py",
    ),
    Fault(
        "cosine does not reach zero",
        "fastflow/trainer/train.py",
        "/ max(1, target_steps - config.warmup)",
        "/ max(1, target_steps)",
        "tests/trainer/test_train.py -k 'rate or resumed or run_leaves'",
    ),
    Fault(
        "time spent before a resume forgotten",
        "fastflow/trainer/budget.py",
        "return self._seconds + time.monotonic() - self._began",
        "return time.monotonic() - self._began",
        "tests/trainer/test_budget.py tests/trainer/test_train.py -k 'budget or minutes'",
    ),
    Fault(
        "best result replaced by the last",
        "fastflow/trainer/run.py",
        "self.best = test_bits if better else self.best",
        "self.best = test_bits",
        "tests/trainer/test_run.py tests/trainer/test_train.py -k 'test_run or leaves or evaluate'",
    ),
    Fault(
        "averages keep the first weights for long",
        "fastflow/trainer/run.py",
        "config.ema, (1 + step) / (10 + step)",
        "config.ema, config.ema",
        "tests/trainer/test_run.py tests/trainer/test_train_models.py -k 'test_run or averaged or resumes'",
    ),
    Fault(
        "a resumed run may change its batches",
        "fastflow/trainer/config.py",
        '"resume out steps minutes lr clip',
        '"resume out batch_size steps minutes lr clip',
        "tests/trainer/test_train.py -k resumed",
    ),
    Fault(
        "averages that never move accepted",
        "fastflow/trainer/config.py",
        "if not 0 <= config.ema < 1:",
        "if not 0 <= config.ema <= 1:",
        "tests/trainer/test_train.py -k test_a_config",
    ),
    Fault(
        "batches of an evaluation share their noise",
        "fastflow/trainer/evaluate.py",
        "seed=noise, offset=start",
        "seed=noise, offset=0",
        "tests/trainer/test_train.py -k 'importance or evaluate'",
    ),
    Fault(
        "two purposes draw the same noise",
        "fastflow/seeds.py",
        "SAMPLES = 13",
        "SAMPLES = 12",
        "tests/test_seeds.py tests/trainer/test_data.py tests/trainer/test_train.py -k 'seed or sample'",
    ),
    Fault(
        "rows after the checkpoint written twice",
        "fastflow/trainer/progress.py",
        "!= str(len(kept)) or len(kept) > step:",
        "!= str(len(kept)):",
        "tests/trainer/test_train.py -k metrics",
    ),
]

CHECKPOINT = [
    Fault(
        "swallowed error: a wrong checksum",
        "fastflow/archive.py",
        "damaged = archive.testzip()",
        "damaged = None",
        "tests/test_checkpoint.py",
    ),
    Fault(
        "code in a file is run",
        "fastflow/archive.py",
        "weights_only=True",
        "weights_only=False",
        "tests/test_checkpoint.py",
    ),
    Fault(
        "dtype of the file lost",
        "fastflow/checkpoint.py",
        "state, assign=True",
        "state",
        "tests/test_checkpoint.py",
    ),
    Fault(
        "a failed write leaves its file",
        "fastflow/checkpoint.py",
        "temporary.unlink(missing_ok=True)",
        "pass",
        "tests/test_checkpoint.py",
    ),
    Fault(
        "loading moves the caller's generator",
        "fastflow/checkpoint.py",
        "with torch.random.fork_rng([]):",
        "if True:",
        "tests/test_checkpoint.py",
    ),
    Fault(
        "a newer format read as this one",
        "fastflow/checkpoint.py",
        'if contents["format"] != FORMAT:',
        'if contents["format"] < FORMAT:',
        "tests/test_checkpoint.py",
    ),
]

EXPLORE = [
    Fault(
        "ties count as losses",
        "fastflow/explore.py",
        "outlier_scores.contiguous(), right=True)",
        "outlier_scores.contiguous())",
        "tests/test_explore.py",
    ),
    Fault(
        "off-by-one level drawn anew",
        "fastflow/explore.py",
        "None if i < levels else z",
        "None if i <= levels else z",
        "tests/test_explore.py",
    ),
    Fault(
        "axes of the plane exchanged",
        "fastflow/explore.py",
        "torch.cartesian_prod(y, x).flip(1)",
        "torch.cartesian_prod(y, x)",
        "tests/test_explore.py",
    ),
    Fault(
        "both ends dequantized by one noise",
        "fastflow/explore.py",
        "derive(seed, Stream.EXPLORE, 1))",
        "derive(seed, Stream.EXPLORE, 0))",
        "tests/test_explore.py",
    ),
    Fault(
        "what is more likely than usual counts as typical",
        "fastflow/explore.py",
        "return (scores - train_scores.mean()).abs()",
        "return scores - train_scores.mean()",
        "tests/test_explore.py",
    ),
]

AREAS = {
    "references": REFERENCE,
    "Triton kernels": TRITON,
    "CUDA kernels": CUDA,
    "C++ for the CPU": CPU,
    "dispatch": DISPATCH,
    "layers": LAYERS,
    "networks and priors": NETWORKS,
    "models": MODELS,
    "reversible": REVERSIBLE,
    "trainer": TRAINER,
    "checkpoint": CHECKPOINT,
    "explore": EXPLORE,
}
FAULTS = [fault for faults in AREAS.values() for fault in faults]
