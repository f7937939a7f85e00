// Every image of the grids opens enlarged, beside another of the same seed and their difference.
const grids = document.getElementById("grids"), zoom = document.getElementById("zoom");
if (grids && zoom) {
  const width = +grids.dataset.width, gap = +grids.dataset.gap, firstSeed = +grids.dataset.seed;
  const find = id => document.getElementById(`zoom-${id}`);
  const panes = [find("this"), find("other"), find("difference")];
  const beside = find("beside"), gain = find("gain");
  const films = [...grids.querySelectorAll(".film")];
  const name = film => film.closest(".group").querySelector("h3").textContent;
  const title = film => film.dataset.role === "float" ? "float model" : `${name(film)}, ${film.dataset.label}`;
  const picture = film => film.querySelector("img");
  let now = null, at = 0;

  // The float model's strip is embedded once and shown beside every artifact.
  for (const film of films) {
    if (!picture(film).hasAttribute("src")) {
      picture(film).src = picture(films.find(other => other.dataset.key === film.dataset.key)).src;
    }
  }

  const count = film => Math.round((picture(film).naturalWidth + gap) / (width + gap));
  const shown = film => film.offsetParent !== null;
  const siblings = film => [...film.parentElement.children].filter(shown);
  const clamp = (value, most) => Math.max(0, Math.min(most, value));

  function moved(film, seed, right, down) {
    const rows = siblings(film), row = rows[clamp(rows.indexOf(film) + down, rows.length - 1)];
    return [row, clamp(seed + right, count(row) - 1)];
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function addButtons(film) {
    const image = picture(film), scale = image.height / image.naturalHeight;
    for (let seed = 0; seed < count(film); seed++) {
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = seed ? -1 : 0;  // one stop a strip; arrows go on from there
      button.setAttribute("aria-label", `Enlarge ${title(film)}, seed ${firstSeed + seed}`);
      button.style.left = `${seed * (width + gap) * scale}px`;
      button.style.width = `${width * scale}px`;
      button.addEventListener("click", () => open(film, seed));
      button.addEventListener("keydown", event => {
        if (!(event.key in arrows)) return;
        event.preventDefault();
        const [row, next] = moved(film, seed, ...arrows[event.key]);
        row.querySelectorAll("button")[next].focus();
      });
      image.parentElement.append(button);
    }
  }

  function others(film) {
    const own = siblings(film).find(each => each.dataset.role === "uncorrected");
    const float = films.find(each => each.dataset.role === "float");
    return [float, own].filter(Boolean);
  }

  function open(film, seed) {
    now = film; at = seed;
    const chosen = beside.value;
    beside.replaceChildren(...others(film).map(each => new Option(title(each), each.dataset.key)));
    if ([...beside.options].some(option => option.value === chosen)) beside.value = chosen;
    draw();
    if (!zoom.open) zoom.showModal();
  }

  function pixels(canvas, film) {
    const image = picture(film), context = canvas.getContext("2d", { willReadFrequently: true });
    canvas.width = width; canvas.height = image.naturalHeight;
    context.drawImage(image, at * (width + gap), 0, width, canvas.height, 0, 0, width, canvas.height);
    return context.getImageData(0, 0, width, canvas.height);
  }

  function tell(canvas, text) {
    canvas.setAttribute("aria-label", text);
    canvas.nextElementSibling.textContent = text;
  }

  function draw() {
    const other = films.find(each => each.dataset.key === beside.value) ?? now;
    const [mine, theirs] = [pixels(panes[0], now), pixels(panes[1], other)];
    const difference = new ImageData(mine.width, mine.height);
    let total = 0;
    for (let i = 0; i < mine.data.length; i++) {
      const apart = Math.abs(mine.data[i] - theirs.data[i]);
      if (i % 4 < 3) total += apart;
      difference.data[i] = i % 4 < 3 ? apart * gain.value : 255;  // clamped by its type
    }
    panes[2].width = mine.width; panes[2].height = mine.height;
    panes[2].getContext("2d").putImageData(difference, 0, 0);
    const mean = total / (mine.data.length * 3 / 4);
    gain.nextElementSibling.textContent = `×${gain.value}`;
    find("title").textContent = `${title(now)} · seed ${firstSeed + at}`;
    tell(panes[0], title(now));
    tell(panes[1], title(other));
    tell(panes[2], `difference ×${gain.value}; mean ${mean.toFixed(1)} of 255`);
  }

  function move(right, down) { open(...moved(now, at, right, down)); }

  zoom.addEventListener("keydown", event => {
    if (!(event.key in arrows) || event.target.matches("input, select")) return;
    event.preventDefault();
    move(...arrows[event.key]);
  });
  for (const button of zoom.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => move(...button.dataset.move.split(",").map(Number)));
  }
  zoom.querySelector(".close").addEventListener("click", () => zoom.close());
  zoom.addEventListener("click", event => { if (event.target === zoom) zoom.close(); });
  zoom.addEventListener("close", () => now.querySelectorAll("button")[at]?.focus());
  gain.addEventListener("input", draw);
  beside.addEventListener("change", draw);
  for (const film of films) {
    const image = picture(film);
    image.decode().then(() => addButtons(film), () => {});
  }
}
