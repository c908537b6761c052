"""How generated digits sound to a classifier of digits: FID, inception scores and AM score, in SaShiMi's protocol.

`mel` makes images of clips, `network` and `classifier` give features and logits of them, `fit` trains the classifier,
`torch_weights` reads the released one, `metrics` compares sets of clips, and `measure` does all of it for a run.
"""
