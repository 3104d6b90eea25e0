"use strict";
// Moves the map of layers x experts through time. The page is complete without it: then the last moment stays.
(() => {
  const get = (name) => document.getElementById("loads-" + name);
  const data = JSON.parse(get("data").textContent);
  const cells = Array.from(document.querySelectorAll("#loads rect.cell"));
  const slider = get("slider"), play = get("play");
  let timer = null;

  // As color_of in heat_map.py.
  function color(percent) {
    const share = Math.min(2, percent / 100);
    const [low, high] = share <= 1 ? [data.colors[0], data.colors[1]] : [data.colors[1], data.colors[2]];
    const part = share <= 1 ? share : share - 1;
    return "rgb(" + low.map((value, i) => Math.round(value + (high[i] - value) * part)).join(",") + ")";
  }

  // cells stand in the order of the layers, and of the experts within a layer
  const sizes = data.layers.map((_, place) => {
    const frame = data.frames.find((rows) => rows[place] !== null);
    return frame[place].length;
  });

  function show(moment) {
    get("when").textContent = data.labels[moment];
    let next = 0;
    data.frames[moment].forEach((row, place) => {
      for (let expert = 0; expert < sizes[place]; expert++) {
        const cell = cells[next++];
        cell.setAttribute("fill", row === null ? "none" : color(row[expert]));
        cell.firstChild.textContent = "layer " + data.layers[place] + ", expert " + expert + ": "
          + (row === null ? "not logged" : (row[expert] / 100).toFixed(2));
      }
    });
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "play";
  }

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (slider.value === slider.max) slider.value = 0;
    show(Number(slider.value));
    play.textContent = "stop";
    timer = setInterval(() => {
      if (slider.value === slider.max) { stop(); return; }
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
    }, 80);
  });
  if (data.frames.length > 1) get("controls").hidden = false;
})();
