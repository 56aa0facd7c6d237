"use strict";
{
  const viewer = document.querySelector(".viewer");
  const heads = [...document.querySelectorAll(".maps button")];
  const words = [...document.querySelectorAll("#looks .token")];
  const large = document.getElementById("large");
  const name = i => "“" + words[i].firstChild.data + "”";
  let weights = null, at = words.length - 1;

  // The weights are in the picture: grey is 255 - 255 sqrt(weight).
  const read = picture => {
    const canvas = document.createElement("canvas"), n = words.length;
    canvas.width = canvas.height = n;
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, n, n).data;
    return (row, column) => ((255 - pixels[4 * (row * n + column)]) / 255) ** 2;
  };

  const look = row => {
    at = row;
    const row_weights = words.map((_, i) => i <= row ? weights(row, i) : 0);
    words.forEach((word, i) => {
      const w = row_weights[i];
      word.classList.toggle("later", i > row);
      word.setAttribute("aria-pressed", i == row);
      word.style.setProperty("--v", 70 * Math.sqrt(w) + "%");
      word.lastChild.textContent = i > row ? " " : w >= .005 ? Math.round(100 * w) : "·";
    });
    const most = row_weights.map((w, i) => [w, i]).sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([w]) => w >= .005);
    document.getElementById("said").textContent = "Token " + row + ", " + name(row) + ", looks at "
      + most.map(([w, i]) => name(i) + " " + Math.round(100 * w) + "%").join(", ") + ".";
  };

  const choose = button => {
    heads.forEach(other => other.setAttribute("aria-pressed", other == button));
    const picture = button.firstElementChild;
    large.src = picture.src;
    large.alt = picture.alt;
    document.getElementById("which").textContent = button.title;
    weights = read(picture);
    look(at);
  };

  const start = () => {
    viewer.hidden = false;
    heads.forEach(button => button.addEventListener("click", () => choose(button)));
    words.forEach((word, i) => word.addEventListener("click", () => look(i)));
    large.addEventListener("click", event => {
      const row = Math.floor(event.offsetY / large.clientHeight * words.length);
      look(Math.min(words.length - 1, Math.max(0, row)));
    });
    choose(heads[0]);
  };
  if (heads.length) addEventListener("load", start);  // once the pictures are there
}
