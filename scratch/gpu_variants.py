"""Scratch: switchable variants of the training step (not shipped)."""
import functools, math
import jax, jax.numpy as jnp
from jaxopt_lab.models import layers, cross_entropy, attention, decoder
from jaxopt_lab.models.sharding import constrain
from jaxopt_lab.models.side import matmul

BAR = jax.lax.optimization_barrier
f32 = jnp.float32

# ---------- gelu ----------
C0, C1 = math.sqrt(2 / math.pi), 0.044715
def _gelu32(x):
    x = x.astype(f32)
    return 0.5 * x * (1 + jnp.tanh(C0 * (x + C1 * x * x * x)))
def _dgelu32(x):
    x = x.astype(f32)
    t = jnp.tanh(C0 * (x + C1 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * C0 * (1 + 3 * C1 * x * x)
@jax.custom_vjp
def gelu_s(x): return _gelu32(x).astype(x.dtype)
gelu_s.defvjp(lambda x: (gelu_s(x), x), lambda x, g: ((g.astype(f32) * _dgelu32(BAR(x))).astype(g.dtype),))
@jax.custom_vjp
def gelu_l(x): return jax.nn.gelu(x)
gelu_l.defvjp(lambda x: (gelu_l(x), x), lambda x, g: ((g.astype(f32) * _dgelu32(BAR(x))).astype(g.dtype),))
# the hidden units themselves are computed again for the product with the cotangent: saves memory
@jax.custom_vjp
def gelu_down(h, w): return jnp.tensordot(gelu_s(h), w, 1)
def _gd_bwd(res, g):
    h, w = res
    h = BAR(h)
    a = _gelu32(h).astype(h.dtype)
    da = jnp.einsum('btd,fd->btf', g, w)
    dw = jnp.einsum('btf,btd->fd', a, g)
    return (da.astype(f32) * _dgelu32(h)).astype(h.dtype), dw
gelu_down.defvjp(lambda h, w: (gelu_down(h, w), (h, w)), _gd_bwd)
# SwiGLU
@jax.custom_vjp
def gated_s(g, u):
    g32 = g.astype(f32); return (g32 * jax.nn.sigmoid(g32) * u.astype(f32)).astype(g.dtype)
def _gated_bwd(res, d):
    g, u = BAR(res); g32, u32, d32 = (a.astype(f32) for a in (g, u, d))
    s = jax.nn.sigmoid(g32)
    return ((d32 * u32 * s * (1 + g32 * (1 - s))).astype(g.dtype), (d32 * g32 * s).astype(u.dtype))
gated_s.defvjp(lambda g, u: (gated_s(g, u), (g, u)), _gated_bwd)

# ---------- norm ----------
def _stats(x, layer, eps):
    y = x.astype(f32)
    mean = jnp.mean(y, -1, keepdims=True) if layer else jnp.zeros(x.shape[:-1] + (1,), f32)
    return mean, jax.lax.rsqrt(jnp.mean(jnp.square(y - mean), -1, keepdims=True) + eps)
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_s(x, scale, layer, eps):
    mean, rstd = _stats(x, layer, eps)
    return ((x.astype(f32) - mean) * rstd * scale).astype(x.dtype)
def _norm_fwd(x, scale, layer, eps):
    mean, rstd = _stats(x, layer, eps)
    return ((x.astype(f32) - mean) * rstd * scale).astype(x.dtype), (x, scale, mean, rstd)
def _norm_bwd(layer, eps, res, dy):
    x, scale, mean, rstd = res
    x, dy = BAR((x, dy)); mean, rstd = BAR((mean, rstd))
    xhat = (x.astype(f32) - mean) * rstd
    dyf = dy.astype(f32)
    dscale = jnp.sum(dyf * xhat, tuple(range(x.ndim - 1)))
    w = dyf * scale
    c = jnp.mean(w * xhat, -1, keepdims=True)
    dx = w - xhat * c
    if layer: dx = dx - jnp.mean(w, -1, keepdims=True)
    return (dx * rstd).astype(x.dtype), dscale
norm_s.defvjp(_norm_fwd, _norm_bwd)

def _plain_norm(x, scale, layer, eps):
    y = x.astype(f32)
    if layer: y = y - jnp.mean(y, -1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + eps) * scale).astype(x.dtype)
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_b(x, scale, layer, eps): return _plain_norm(x, scale, layer, eps)
def _norm_b_bwd(layer, eps, res, dy):
    x, scale = res
    shape, n = x.shape, x.shape[-1]
    x, dy = BAR((x.reshape(-1, n), dy.reshape(-1, n)))
    xf = x.astype(f32); dyf = dy.astype(f32); w = dyf * scale
    s1 = jnp.mean(xf, -1, keepdims=True) if layer else 0.0
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(xf - s1), -1, keepdims=True) + eps)
    xhat = (xf - s1) * rstd
    dscale = jnp.sum(dyf * xhat, 0)
    dx = w - xhat * jnp.mean(w * xhat, -1, keepdims=True)
    if layer: dx = dx - jnp.mean(w, -1, keepdims=True)
    return (dx * rstd).astype(x.dtype).reshape(shape), dscale
norm_b.defvjp(lambda x, s, l, e: (norm_b(x, s, l, e), (x, s)), _norm_b_bwd)
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_c(x, scale, layer, eps): return _plain_norm(x, scale, layer, eps)
def _norm_c_bwd(layer, eps, res, dy):
    x, scale = res
    shape, n = x.shape, x.shape[-1]
    x, dy = BAR((x.reshape(-1, n), dy.reshape(-1, n)))
    mean, rstd = BAR(_stats(x, layer, eps))
    dyf = dy.astype(f32)
    dscale = jnp.sum(dyf * (x.astype(f32) - mean) * rstd, 0)
    xf = x.astype(f32); w = dyf * scale
    xhat = (xf - mean) * rstd
    dx = w - xhat * jnp.mean(w * xhat, -1, keepdims=True)
    if layer: dx = dx - jnp.mean(w, -1, keepdims=True)
    return (dx * rstd).astype(x.dtype).reshape(shape), dscale
norm_c.defvjp(lambda x, s, l, e: (norm_c(x, s, l, e), (x, s)), _norm_c_bwd)
# statistics are outputs of the forward pass, with the variance in one pass
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_1(x, scale, layer, eps): return _norm1_fwd(x, scale, layer, eps)[0]
def _norm1_fwd(x, scale, layer, eps):
    y = x.astype(f32)
    sq = jnp.mean(y * y, -1, keepdims=True)
    mean = jnp.mean(y, -1, keepdims=True) if layer else jnp.zeros_like(sq)
    rstd = jax.lax.rsqrt(jnp.maximum(sq - mean * mean, 0) + eps)
    return ((y - mean) * rstd * scale).astype(x.dtype), (x, scale, mean, rstd)
norm_1.defvjp(_norm1_fwd, lambda l, e, res, dy: _norm_bwd(l, e, res, dy))

# ---------- q, k, v as three products ----------
def _mm(a, b, ca, cb): return jax.lax.dot_general(a, b, (((ca,), (cb,)), ((), ())))
@jax.custom_vjp
def three(x, w):
    x2 = x.reshape(-1, x.shape[-1])
    xs = BAR((x2, x2, x2))
    return tuple(_mm(xs[i], w[:, i], 1, 0).reshape(*x.shape[:-1], -1) for i in range(3))
def _three_bwd(res, ds):
    x, w = res
    x2 = x.reshape(-1, x.shape[-1])
    xs = BAR((x2, x2, x2)); ds = tuple(d.reshape(-1, d.shape[-1]) for d in ds)
    dw = jnp.stack([_mm(xs[i], ds[i], 0, 0) for i in range(3)], 1)
    dx = _mm(ds[0], w[:, 0], 1, 1)
    for i in (1, 2): dx = BAR(dx) + _mm(ds[i], w[:, i], 1, 1)
    return dx.reshape(x.shape), dw
three.defvjp(lambda x, w: (three(x, w), (x, w)), _three_bwd)
@jax.custom_vjp
def three_cat(x, w): return three(x, w)
def _three_cat_bwd(res, ds):
    x, w = res
    d = jnp.stack([d.reshape(-1, d.shape[-1]) for d in ds], 1).reshape(-1, 3 * ds[0].shape[-1])
    x2 = x.reshape(-1, x.shape[-1]); w2 = w.reshape(w.shape[0], -1)
    return _mm(d, w2, 1, 1).reshape(x.shape), _mm(x2, d, 0, 0).reshape(w.shape)
three_cat.defvjp(lambda x, w: (three(x, w), (x, w)), _three_cat_bwd)

# ---------- pallas kernels ----------
from jax.experimental import pallas as pl
try:
    from jax.experimental.pallas import triton as plt_
except Exception:
    plt_ = None
INTERPRET = False
def _params(warps, stages=1): return plt_.CompilerParams(num_warps=warps, num_stages=stages)

def _pow2(n): return 1 << (n - 1).bit_length()

def _addnorm_fwd_kernel(x, y, s, o, n, m, r, *, d, layer, eps):
    k = _pow2(d); i = jnp.arange(k); ok = i < d
    ld = lambda ref, *ix: plt_.load(ref.at[(*ix, pl.ds(0, k))], mask=ok, other=0.0).astype(f32)
    row = pl.program_id(0)
    v = ld(x, row) + (ld(y, row) if y is not None else 0)
    if y is not None:
        vb = v.astype(o.dtype); v = vb.astype(f32)
        plt_.store(o.at[row, pl.ds(0, k)], vb, mask=ok)
    mean = jnp.sum(v) / d if layer else jnp.float32(0)
    c = jnp.where(ok, v - mean, 0)
    rstd = jax.lax.rsqrt(jnp.sum(c * c) / d + eps)
    plt_.store(n.at[row, pl.ds(0, k)], (c * rstd * ld(s)).astype(n.dtype), mask=ok)
    m[row] = mean; r[row] = rstd

def addnorm_fwd_call(x, y, scale, layer, eps, warps=4):
    R, d = x.shape
    bs = pl.BlockSpec(memory_space=None)
    out = [jax.ShapeDtypeStruct((R, d), x.dtype), jax.ShapeDtypeStruct((R, d), x.dtype),
           jax.ShapeDtypeStruct((R,), f32), jax.ShapeDtypeStruct((R,), f32)]
    return pl.pallas_call(functools.partial(_addnorm_fwd_kernel, d=d, layer=layer, eps=eps), grid=(R,),
        out_shape=out, interpret=INTERPRET, compiler_params=_params(warps), name="add_norm")(x, y, scale)

def _addnorm_bwd_kernel(x, dn, dres, s, m, r, dx, ds, *, d, rows, layer):
    k = _pow2(d); i = jnp.arange(k); ok = i < d
    ld = lambda ref, *ix: plt_.load(ref.at[(*ix, pl.ds(0, k))], mask=ok, other=0.0).astype(f32)
    p = pl.program_id(0); scale = ld(s)
    def one(j, acc):
        row = p * rows + j
        rstd, mean = r[row], m[row]
        xhat = jnp.where(ok, (ld(x, row) - mean) * rstd, 0)
        g = ld(dn, row); w = g * scale
        c = jnp.sum(w * xhat) / d
        o = w - xhat * c
        if layer: o = o - jnp.sum(w) / d
        o = o * rstd + ld(dres, row)
        plt_.store(dx.at[row, pl.ds(0, k)], o.astype(dx.dtype), mask=ok)
        return acc + g * xhat
    acc = jax.lax.fori_loop(0, rows, one, jnp.zeros((k,), f32))
    plt_.store(ds.at[p, pl.ds(0, k)], acc, mask=ok)

def addnorm_bwd_call(x, dn, dres, scale, mean, rstd, layer, rows=16, warps=4):
    R, d = x.shape
    out = [jax.ShapeDtypeStruct((R, d), x.dtype), jax.ShapeDtypeStruct((R // rows, d), f32)]
    dx, ds = pl.pallas_call(functools.partial(_addnorm_bwd_kernel, d=d, rows=rows, layer=layer), grid=(R // rows,),
        out_shape=out, interpret=INTERPRET, compiler_params=_params(warps, 2), name="add_norm_backward")(x, dn, dres, scale, mean, rstd)
    return dx, ds.sum(0)

ROWS, WARPS, BWARPS = 16, 4, 4
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_norm(x, y, scale, layer, eps): return _an_fwd(x, y, scale, layer, eps)[0]
def _an_fwd(x, y, scale, layer, eps):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    o, n, m, r = addnorm_fwd_call(flat(x), flat(y), scale, layer, eps, WARPS)
    return (o.reshape(x.shape), n.reshape(x.shape)), (o, scale, m, r)
def _an_bwd(layer, eps, res, ct):
    o, scale, m, r = res; dres, dn = ct
    flat = lambda a: a.reshape(-1, a.shape[-1])
    dx, ds = addnorm_bwd_call(o, flat(dn), flat(dres), scale, m, r, layer, ROWS, BWARPS)
    dx = dx.reshape(dn.shape)
    return dx, dx, ds
add_norm.defvjp(_an_fwd, _an_bwd)

# ---------- cross-entropy ----------
def _ce_kernel(l, t, w, g, nats, lse, *, v, block):
    row = pl.program_id(0)
    i = jnp.arange(block)
    steps = -(-v // block)
    def ld(j, other):
        ok = j * block + i < v
        return plt_.load(l.at[row, pl.ds(j * block, block)], mask=ok, other=other).astype(f32), ok
    def stat(j, c):
        m, s = c
        x, _ = ld(j, -jnp.inf)
        new = jnp.maximum(m, x)
        return new, s * jnp.exp(m - new) + jnp.exp(x - new)
    x0, _ = ld(0, -jnp.inf)
    m, s = jax.lax.fori_loop(1, steps, stat, (x0, jnp.ones((block,), f32)))
    top = jnp.max(m)
    z = jnp.log(jnp.sum(s * jnp.exp(m - top))) + top
    target = t[row]; weight = w[row]
    tl = l[row, target].astype(f32)
    nats[row] = z - tl; lse[row] = z
    def grad(j, _):
        x, ok = ld(j, -jnp.inf)
        p = jnp.exp(x - z) - (j * block + i == target).astype(f32)
        plt_.store(g.at[row, pl.ds(j * block, block)], (p * weight).astype(g.dtype), mask=ok)
        return _
    jax.lax.fori_loop(0, steps, grad, 0)

CE_BLOCK, CE_WARPS, CE_STAGES = 4096, 8, 2
def ce_call(logits, targets, weights):
    R, v = logits.shape
    out = [jax.ShapeDtypeStruct((R, v), logits.dtype), jax.ShapeDtypeStruct((R,), f32), jax.ShapeDtypeStruct((R,), f32)]
    return pl.pallas_call(functools.partial(_ce_kernel, v=v, block=CE_BLOCK), grid=(R,), out_shape=out,
        interpret=INTERPRET, compiler_params=_params(CE_WARPS, CE_STAGES), name="cross_entropy", input_output_aliases={0: 0})(logits, targets, weights)

def _online(x):
    def merge(a, b):
        (m, s), (n, t) = a, b
        top = jnp.maximum(m, n)
        lo = jnp.minimum(m, n)
        e = jnp.where(lo == top, 1.0, jnp.exp(lo - top))
        return top, jnp.where(m >= n, s + t * e, t + s * e)
    m, s = jax.lax.reduce((x, jnp.ones_like(x)), (jnp.float32(-jnp.inf), jnp.float32(0)), merge, (x.ndim - 1,))
    return m + jnp.log(s)

def _ce_xla(logits, targets, weights, online):
    x = logits.astype(f32)
    z = _online(x) if online else jax.nn.logsumexp(x, -1)
    tl = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0].astype(f32)
    hot = jnp.arange(logits.shape[1]) == targets[:, None]
    g = ((jnp.exp(x - z[:, None]) - hot) * weights[:, None]).astype(logits.dtype)
    return g, z - tl, z

@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_sums(x, head, targets, weights, how): return _hs_fwd(x, head, targets, weights, how)[0]
def _hs_fwd(x, head, targets, weights, how):
    B, T, D = x.shape
    logits = jnp.dot(x.reshape(-1, D), head)
    t, w = targets.reshape(-1), weights.reshape(-1)
    g, nats, z = ce_call(logits, t, w) if how == "pallas" else _ce_xla(logits, t, w, how == "online")
    total = jnp.sum(w * nats)
    return (total, total), (g, x, head)
def _hs_bwd(how, res, ct):
    g, x, head = res
    B, T, D = x.shape
    dx = jnp.dot(g, head.T).reshape(x.shape)
    dh = jnp.dot(x.reshape(-1, D).T, g)
    c = ct[0]
    return (dx * c.astype(dx.dtype), (dh * c.astype(dh.dtype)), None, None)
head_sums.defvjp(_hs_fwd, _hs_bwd)

# ---------- patches ----------
ORIG = dict(hidden=decoder.Decoder.hidden, emb=decoder.Embedding.__call__, attn=layers.Attention.__call__, mlp=layers.MLP.__call__, norm=layers.Norm.__call__, block=layers.Block.__call__, ws=cross_entropy._weighted_sums)

def apply(names):
    """names: set of variant names; patches the model."""
    layers.Attention.__call__, layers.MLP.__call__, layers.Norm.__call__, layers.Block.__call__, cross_entropy._weighted_sums = (ORIG[k] for k in ("attn", "mlp", "norm", "block", "ws"))
    on = names.__contains__
    if on("qkv3") or on("qkv3c"):
        def attn(self, x, seg, mesh):
            c = self.config; B, T, _ = x.shape
            k = self.qkv.kernel[...].astype(x.dtype)
            q, kk, v = (a.reshape(B, T, -1, c.head_width) for a in (three if on("qkv3") else three_cat)(x, k))
            if c.positions == "rope":
                q, kk = (layers.rotate(a, c.rope_base, c.rope_scaling) for a in (q, kk))
            y = layers.attend(q, kk, v, seg, kernel=c.attention, mesh=mesh)
            return self.out(y.reshape(B, T, -1))
        layers.Attention.__call__ = attn
    act = {"gelu_s": gelu_s, "gelu_l": gelu_l}
    if on("gelu_s") or on("gelu_l") or on("gelu_ck") or on("gelu_down"):
        gated = gated_s
        f = gelu_s if on("gelu_s") or on("gelu_down") else gelu_l if on("gelu_l") else jax.checkpoint(jax.nn.gelu)
        if on("gelu_ck"): gated = jax.checkpoint(layers._gated)
        def mlp(self, x, mesh):
            h = self.up(x)
            if self.config.mlp == "swiglu": return self.down(gated(self.gate(x), h))
            if on("gelu_down"): return gelu_down(h, self.down.kernel[...].astype(h.dtype))
            return self.down(f(h))
        layers.MLP.__call__ = mlp
    nf = norm_s if on("norm_s") else norm_b if on("norm_b") else norm_c if on("norm_c") else norm_1 if on("norm_1") else None
    if nf:
        def norm(self, x): return nf(x, self.scale[...], self.config.norm == "layer", self.config.norm_eps)
        layers.Norm.__call__ = norm
    if on("barrier"):
        def block(self, x, seg=None, mesh=None):
            x = x + BAR(self.attention(self.attention_norm(x), seg, mesh))
            return x + BAR(self.mlp(self.mlp_norm(x), mesh))
        layers.Block.__call__ = block
    if on("add_norm"):  # the second norm of a block alone: the first has its sum in the block before
        def block(self, x, seg=None, mesh=None):
            y = self.attention(self.attention_norm(x), seg, mesh)
            x, n = add_norm(x, y, self.mlp_norm.scale[...], self.config.norm == "layer", self.config.norm_eps)
            m = self.mlp(n, mesh)
            return (x + BAR(m)) if on("barrier") else x + m
        layers.Block.__call__ = block
    decoder.Embedding.__call__ = ORIG["emb"]
    if on("emb"):
        def emb(self, tokens, seg, mesh, sides=None):
            x = self.tokens[...][tokens]
            if self.config.positions == "learned": x = x + self.positions[...][None, :tokens.shape[1]]
            return x.astype(self.config.compute_dtype)
        decoder.Embedding.__call__ = emb
    decoder.Decoder.hidden = ORIG["hidden"]
    if on("an_all"):
        def block(self, x, seg=None, mesh=None):
            c = self.attention_norm.config; layer = c.norm == "layer"
            if isinstance(x, tuple): x, n = add_norm(*x, self.attention_norm.scale[...], layer, c.norm_eps)
            else: n = norm_b(x, self.attention_norm.scale[...], layer, c.norm_eps)
            y = self.attention(n, seg, mesh)
            x, n = add_norm(x, y, self.mlp_norm.scale[...], layer, c.norm_eps)
            return x, self.mlp(n, mesh)
        layers.Block.__call__ = block
        def hidden(self, tokens, seg=None, *, mesh=None, side=None):
            x = self.embedding(tokens, seg, mesh, {})
            x = decoder.through(self.config, self.layers, x, lambda b, x, k: b(x, seg, mesh), {})
            return add_norm(*x, self.final_norm.scale[...], self.config.norm == "layer", self.config.norm_eps)[1]
        decoder.Decoder.hidden = hidden
    how = next((h for h in ("pallas", "online", "plain") if on("ce_" + h)), None)
    if how:
        def ws(x, head, targets, weights, z_loss, mesh): return head_sums(x, head[0], targets, weights, how)
        cross_entropy._weighted_sums = ws
