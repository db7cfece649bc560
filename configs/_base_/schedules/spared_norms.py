# For a base whose key 'backbone' in `custom_keys` sets a tenth of the learning rate and
# all of the weight decay for the whole of it: norms and GRN are spared the latter.
spared_norms = {
    name: dict(lr_mult=0.1, decay_mult=0.0)
    for name in (
        'backbone.norm',
        'backbone.downsample_layers.0.1',
        'backbone.downsample_layers.1.0',
        'backbone.downsample_layers.2.0',
        'backbone.downsample_layers.3.0',
        '.norm.weight',
        '.norm.bias',
        '.grn.gamma',
        '.grn.beta',
    )
}
