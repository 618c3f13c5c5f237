"""Pictures of data: what a data set holds (`report`), and what augmentation makes of it (`contact`). Drawn by Pillow."""
