r"""SGD as motion in a fluctuating landscape: moments, regimes, Langevin counterparts, ensembles.

A step $w_{n+1} = w_n - \eta \nabla L_n(w_n)$ is deterministic motion on the loss $L_n$ of a batch,
which is drawn anew for every step. Its noise enters at order $\eta$ and depends on $w$ through the
fluctuating Hessian, unlike the $\sqrt\eta$ kicks of a Brownian particle.

Source: Ignashin, Radovskaya, Semenov, Lopatin, Potapov, Kovalenko, Veprikov, Shestakov, Leonidov
and Beznosikov, "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics", arXiv
2605.22644.
"""

__all__: list[str] = []
