import sys, dataclasses, jax, jax.numpy as jnp, numpy as np
sys.path.insert(0,'scratch')
import gpu_variants as gv
gv.INTERPRET=True
gv.ROWS=4; gv.CE_BLOCK=64
from jaxopt_lab import models
from jaxopt_lab.tasks import language_model_loss
def run(names, name, dtype):
    c=dataclasses.replace(models.PRESETS[name],vocab_size=150,width=48,depth=2,heads=4,context=16,compute_dtype=dtype,hidden=64)
    p=models.init_params(c,jax.random.key(0)); p=jax.tree.map(lambda x: 3*x+0.05*jax.random.normal(jax.random.key(1),x.shape),p)
    t=jax.random.randint(jax.random.key(2),(4,17),0,150)
    gv.apply(set(names.split('+')))
    def f(p): return models.loss(c,p,{"tokens":t})[0]
    return jax.jit(jax.value_and_grad(f))(p)
for name in ('gpt2-124m','llama-124m'):
  ref=run('none',name,'float32')
  for dt in ('float32','bfloat16'):
    for v in sys.argv[1:]:
      l,g=run(v,name,dt)
      e=jax.tree.map(lambda a,b: float(jnp.linalg.norm(a-b)/jnp.linalg.norm(b)),g,ref[1])
      print(name,dt,v,f"loss {float(l-ref[0]):.1e} grad",f"{max(jax.tree.leaves(e)):.1e}", f"mean {np.mean(jax.tree.leaves(e)):.2e}")
