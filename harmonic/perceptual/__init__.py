"""FID, inception scores and AM score of generated digits, by a classifier of digits, in SaShiMi's protocol.

`mel` makes images of clips, `network` and `classifier` compute their features and logits, `fit` trains the classifier,
`torch_weights` reads the released one, `metrics` compares sets of clips, and `measure` does all of this for a run.
"""
