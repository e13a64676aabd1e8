import sys; sys.path.insert(0, 'scratch')
import os, time, functools, dataclasses, traceback
T0 = time.time()
import device1 as d
import jax, jax.numpy as jnp, numpy as np
from jaxopt_lab.models import gpu_kernels as gk
say = d.say
LIMIT = float(sys.argv[1])
left = lambda: LIMIT - (time.time() - T0)
R, V, D = 32768, 50304, 768
k = jax.random.key(0)
def tune_ce():
    t = jax.random.randint(k, (R,), 0, V); w = jnp.full((R,), 1 / R); res = {}
    make = jax.jit(lambda: jax.random.normal(k, (R, V), jnp.bfloat16))
    for b, wa, st in [(8192, 32, 1), (8192, 32, 2), (8192, 32, 3), (4096, 16, 2), (4096, 16, 3), (4096, 32, 2), (2048, 8, 3), (2048, 16, 3), (1024, 4, 4)]:
        try:
            gk._VOCABULARY_BLOCK, gk._VOCABULARY_WARPS, gk._VOCABULARY_STAGES = b, wa, st
            l = make()
            c = jax.jit(lambda l: gk.cross_entropy(l, t, w, 0.0)[0], donate_argnums=0).lower(l).compile()
            s = d.timed(c, l, 6); res[s] = (b, wa, st); say(f'ce {b} {wa} {st}: {1e3*s:.3f} ms')
        except Exception as e: say('ce', b, wa, st, type(e).__name__, str(e)[:80])
    gk._VOCABULARY_BLOCK, gk._VOCABULARY_WARPS, gk._VOCABULARY_STAGES = res[min(res)]
    l = make(); want = jax.jit(lambda l: d.gv._ce_xla(l, t, w, False))(l); got = jax.jit(lambda l: gk.cross_entropy(l, t, w, 0.0))(l)
    e = lambda a, b: float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
    say('ce error', [f'{e(a[:4096] if a.ndim > 1 else a, b[:4096] if b.ndim > 1 else b):.1e}' for a, b in zip(got, want)])
def tune_norm():
    x, y = (jax.random.normal(jax.random.fold_in(k, i), (R, D), jnp.bfloat16) for i in range(2)); s0 = jnp.ones(D); res = {}
    N = 8
    for wa in (1, 2, 4, 8):
        gk._norm_warps = lambda width: wa
        def f(x):
            for _ in range(N): x = gk._add_norm_forward(x, y, s0, True, 1e-5)[0][1]
            return x
        c = jax.jit(f, donate_argnums=0).lower(x).compile(); s = d.timed(c, x + 0, 10) / N; res[s] = wa; say(f'norm fwd warps {wa}: {1e6*s:.1f} us')
    F = res[min(res)]
    gk._norm_warps = lambda width: 4
    r = gk._add_norm_forward(x, y, s0, True, 1e-5)[1]; res = {}
    for rows, wa in [(16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (64, 4), (32, 8)]:
        gk._norm_warps = lambda width: wa; gk._ROWS = rows
        def f(g):
            for _ in range(N): g = gk._add_norm_backward(True, 1e-5, r, (g, y))[0]
            return g
        c = jax.jit(f, donate_argnums=0).lower(x).compile(); s = d.timed(c, x + 0, 10) / N; res[s] = (rows, wa); say(f'norm bwd rows {rows} warps {wa}: {1e6*s:.1f} us')
    gk._ROWS, wa = res[min(res)]; gk._norm_warps = lambda width: wa; say('chosen', F, gk._ROWS, wa)
OFF = {'xla_gpu_enable_triton_gemm': False}
if __name__ == '__main__':
    for f in (tune_ce, tune_norm):
        try: f()
        except Exception as e: say(f.__name__, 'FAILED', str(e)[:300]); traceback.print_exc()
    say(f'tuned at {time.time()-T0:.0f} s')
    d.step('none', options=OFF, profile=True, rounds=5)
    d.step('none', 'llama-124m', options=OFF, profile=True)
    d.step('none', options={**OFF, 'xla_gpu_enable_command_buffer': ''}, rounds=5)
    d.step('none', B=64, options=OFF, n=6)
    d.step('none', options={**OFF, 'xla_gpu_enable_latency_hiding_scheduler': False})
    say(f'ours at {time.time()-T0:.0f} s')
    if left() > 30: d.step('none', 'gpt2-355m', options=OFF, n=5, profile=True)
    say(f'355 at {time.time()-T0:.0f} s')
    if left() > 35:
        from jaxopt_lab import models
        from jaxopt_lab.bench.torch_training import TorchTrainer
        import torch
        for model in ('gpt2-124m', 'llama-124m'):
            if left() < 30: break
            c = dataclasses.replace(models.PRESETS[model], context=1024, compute_dtype='bfloat16')
            tr = TorchTrainer(c, models.init_params(c, jax.random.key(0)), jax.random.randint(jax.random.key(1), (32, 1025), 0, c.vocab_size), rate=1e-6, decay=0.1)
            ct = tr.warm_up(); ms = [1e3 * tr.run(12) for _ in range(3)]
            say(f'torch {torch.__version__} {model}: {sorted(ms)[1]:.2f} ms {32*1024/sorted(ms)[1]*1e3:,.0f} tok/s peak {tr.peak_bytes()/2**30:.2f} GiB compile {ct:.0f} s', ms)
            del tr; torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    say(f'end {time.time()-T0:.0f} s')
