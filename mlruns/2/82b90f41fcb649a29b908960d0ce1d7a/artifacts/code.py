@lab.experiment(name="größe")
def f(n, name="a", deep=None):
    fig, ax = plt.subplots(figsize=(1,1)); ax.plot([0,n])
    return {"loss": 0.5*n, "deep": {"acc": [0.1,0.2]}, "t": torch.arange(n), "fig": fig, "word":"x", "nan": float("nan"), "inf": float("inf"), "flag": True, "layer[3].z/x": 1.0, "": 3, "a"*300: 1.0}
