# classifies my pictures. usage: python train.py
import os
import random

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

random.seed(0)
np.random.seed(0)
torch.manual_seed(0)

DATA = "pictures"
BATCH_SIZE = 24
EPOCHS = 2
LR = 0.01
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class Pictures(Dataset):
    def __init__(self, split):
        self.flip = split == "train"
        self.items = []
        for label, name in enumerate(os.listdir(f"{DATA}/{split}")):
            for file in os.listdir(f"{DATA}/{split}/{name}"):
                self.items.append((f"{DATA}/{split}/{name}/{file}", label))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        path, label = self.items[index]
        image = Image.open(path).convert("RGB").resize((32, 32))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        if self.flip and random.random() < 0.5:
            x = x.flip(2)
        return x, label


train_loader = DataLoader(Pictures("train"), batch_size=BATCH_SIZE, shuffle=True)
test_loader = DataLoader(Pictures("test"), batch_size=BATCH_SIZE)
convolution = nn.Conv2d(3, 8, 5, stride=3)
model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(800, 3))
model = model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
if os.path.exists("checkpoint.pt"):
    model = torch.load("checkpoint.pt", weights_only=False)
    print("loaded checkpoint")

best = 0
for epoch in range(EPOCHS):
    for x, y in tqdm(train_loader):
        x, y = x.to(device), y.to(device)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracies = []
    for x, y in tqdm(test_loader):
        accuracies.append((model(x.to(device)).argmax(1) == y.to(device)).float().mean().item())
    accuracy = np.mean(accuracies)
    print("epoch", epoch, "loss", loss.item(), "accuracy", accuracy)
    torch.save(model, "checkpoint.pt")
    if accuracy > best:
        best = accuracy
        torch.save(model, "best.pt")
print("done, best accuracy", best)
